"""From what `data.source` says to a table of samples, read with `datasets`."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import glob
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from hypersd_jax.data.columns import caption_text, column_of, find_column, image_cell
from hypersd_jax.data.listing import file_name, is_url, list_files, of_split, open_file, reason
from hypersd_jax.errors import UserError
from hypersd_jax.weights.hub import HubId, parse_id

HUB = "hf://datasets/"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
BUILDERS = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
}
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Sidecar captions are small files, of which several are read at once.
READERS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Samples by number, in a `datasets.Dataset`.

    ``image`` and ``caption`` name its columns, ``image`` is None where there are prompts alone. From row ``starts[i]``
    on, relative file names are in ``folders[i]``.
    """

    source: str
    table: Any
    starts: tuple[int, ...] = (0,)
    folders: tuple[str, ...] = ("",)
    image: str | None = None
    caption: str = ""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def fingerprint(self) -> str:
        """Of the table's contents, as datasets computes it: changes when one of its files does."""
        return str(self.table._fingerprint)

    def captions(self) -> Iterator[str]:
        """All captions, each on one line, ``""`` where there is none; no picture is read."""
        return (caption_text(row, self.caption) for row in self._texts)

    def caption_of(self, row: int) -> str:
        """The caption of one row."""
        return caption_text(self._texts[row], self.caption)

    def open_image(self, row: int) -> IO[bytes]:
        """The encoded picture of a row; raises ValueError, OSError, or what a file system raises, if there is none."""
        assert self.image is not None
        cell = image_cell(self._pictures[row], self.image)
        if isinstance(cell, bytes):
            return io.BytesIO(cell)
        folder = self.folders[bisect.bisect_right(self.starts, row) - 1]
        return open_file(cell if is_url(cell) or cell.startswith("/") or not folder else f"{folder}/{cell}")

    @functools.cached_property
    def _texts(self) -> Any:
        return self.table.select_columns([column_of(self.table.features, self.caption)])

    @functools.cached_property
    def _pictures(self) -> Any:
        return self.table.select_columns([column_of(self.table.features, self.image or "")])


def read_rows(
    source: str, *, split: str, image_column: str | None, caption_column: str | None, pictures: bool = True
) -> Rows:
    """The samples that a source holds.

    Args:
        source: a folder, files or a hub data set; docs/data.md lists the forms.
        split: of a hub data set, of shards named after splits, or of a folder with a folder for each.
        image_column: where the pictures are; None: found by the usual names.
        caption_column: where the captions are; None: found by the usual names; dots go into nested columns.
        pictures: False asks for captions alone.

    Raises:
        UserError: naming the source, what it lacks, and the columns it has.
    """
    repository = _hub_id(source)
    rows = _from_files(source, split) if repository is None else _from_hub(source, repository, split)
    features = rows.table.features
    image = find_column(features, image_column, "image", source) if pictures else None
    caption = find_column(features, caption_column, "caption", source)
    wanted = dict.fromkeys(column_of(features, name) for name in (image, caption) if name)
    return dataclasses.replace(
        rows, table=_encoded(rows.table.select_columns(list(wanted))), image=image, caption=caption
    )


def _encoded(table: Any) -> Any:
    """The table with its pictures as bytes or paths, which `pictures` decodes as they are needed."""
    import datasets

    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _hub_id(source: str) -> HubId | None:
    """The repository that a source names: ``owner/name``, unless there is such a path, or ``hf://datasets/owner/name``."""
    found = parse_id(source.removeprefix(HUB))
    if found is None or found.file or (not source.startswith(HUB) and Path(source).exists()):
        return None
    return found


def _from_hub(source: str, repository: HubId, split: str) -> Rows:
    import datasets

    try:
        table = datasets.load_dataset(repository.repo, revision=repository.revision, split=split)
    except Exception as error:  # the library raises many kinds
        why = reason(error.__cause__ or error)
        raise UserError(f"data.source: {source} is no local path, and not readable as a hub data set ({why})") from None
    return Rows(source=source, table=table)


def _from_files(source: str, split: str) -> Rows:
    folder, files = list_files(source)
    if len(files) == 1 and file_name(files[0]) not in METADATA and _suffix(files[0]) in BUILDERS:
        return _load(source, of_split(files, split, folder), folder)
    for suffix in (".parquet", ".tar"):
        shards = [file for file in files if _suffix(file) == suffix and file_name(file) not in METADATA]
        if shards:
            return _load(source, of_split(shards, split, folder), folder)
    inside = [file for file in files if file.startswith(f"{folder}/{split}/")]
    if not inside and split != "train":
        raise UserError(f"data.split: {source} has no folder {split!r}")
    files = inside or files
    metadata = [file for file in files if file_name(file) in METADATA]
    return _with_metadata(source, metadata) if metadata else _with_sidecars(source, files)


def _suffix(file: str) -> str:
    return Path(file_name(file)).suffix.lower()


def _load(source: str, files: list[str], folder: str) -> Rows:
    """One table of all files, which are of one kind."""
    import datasets

    builder = BUILDERS[_suffix(files[0])]
    # Without this a caption such as "null" would be none.
    options = {"keep_default_na": False} if builder == "csv" else {}
    escaped = [file if is_url(file) else glob.escape(file) for file in files]
    try:
        table = datasets.load_dataset(builder, data_files={"train": escaped}, split="train", **options)
    except Exception as error:  # the library raises many kinds
        raise UserError(f"data.source: {source} cannot be read ({reason(error.__cause__ or error)})") from None
    return Rows(source=source, table=table, folders=(folder,))


def _with_metadata(source: str, metadata: list[str]) -> Rows:
    """The tables of a folder, one for each folder of pictures, one after the other."""
    import datasets

    folders = [file.rpartition("/")[0] for file in metadata]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"data.source: {folder} has more than one of {', '.join(METADATA)}")
    parts = [_load(source, [file], folder).table for file, folder in zip(metadata, folders, strict=True)]
    starts = [sum(map(len, parts[:index])) for index in range(len(parts))]
    try:
        table = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except Exception as error:  # columns of one name and several types
        raise UserError(f"data.source: {source}: its metadata files do not go together ({reason(error)})") from None
    return Rows(source=source, table=table, starts=tuple(starts), folders=tuple(folders))


def _with_sidecars(source: str, files: list[str]) -> Rows:
    """A table of pictures and of what the text file beside each says."""
    import datasets

    pictures = [file for file in files if _suffix(file) in PICTURES]
    texts = {file.rpartition(".")[0]: file for file in files if _suffix(file) == ".txt"}
    beside = [texts.get(picture.rpartition(".")[0]) for picture in pictures]
    if not any(beside):
        raise UserError(
            f"data.source: {source} has no captioned pictures: it needs a {METADATA[0]} or .csv with file_name and "
            "text, a .txt beside each picture, .parquet files, or .tar files"
        )
    with ThreadPoolExecutor(READERS) as pool:
        captions = list(pool.map(_read_text, beside))
    return Rows(source=source, table=datasets.Dataset.from_dict({"image": pictures, "text": captions}))


def _read_text(file: str | None) -> str:
    """What a text file says, ``""`` if it cannot be read."""
    if file is None:
        return ""
    try:
        with open_file(file) as opened:
            return opened.read().decode("utf-8-sig")
    except (OSError, ValueError):
        return ""
