"""From the value of `data.source` to a table of examples."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

from hypersd_jax.data.columns import caption_text, column_of, find_column, json_cell
from hypersd_jax.data.examples import READERS, Examples
from hypersd_jax.data.listing import Listing, file_name, is_url, list_files, open_file, reason, stamp
from hypersd_jax.data.splits import images_of, shards_of
from hypersd_jax.data.tables import TEXT_TABLES, Columns, join_tables, read_table
from hypersd_jax.errors import UserError
from hypersd_jax.files import UNREAD_ENDINGS, is_readable
from hypersd_jax.weights.hub import HubId, parse_id

HUB = "hf://datasets/"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SHARDS = (".parquet", ".tar")


def read_examples(
    source: str, *, split: str, image_column: str | None, caption_column: str | None, images: bool = True
) -> Examples:
    """Read the examples that a source holds.

    Args:
        source: a folder, files or a hub dataset; docs/data.md lists the forms.
        split: of a hub dataset, of shards named after splits, or of a folder with a folder for each.
        image_column: where the images are; None: found by the usual names.
        caption_column: where the captions are; None: found by the usual names; dots go into nested columns.
        images: False asks for captions alone.

    Raises:
        UserError: naming the source, what it lacks, and the columns it has.
    """
    repository = _hub_id(source)
    rows = _from_files(list_files(source), split) if repository is None else _from_hub(source, repository, split)
    features = _with_json(rows.table)
    image = find_column(features, image_column, "image", source) if images else None
    caption = find_column(features, caption_column, "caption", source)
    wanted = dict.fromkeys(column_of(features, name) for name in (image, caption) if name)
    found = dataclasses.replace(
        rows, table=_encoded(rows.table.select_columns(list(wanted))), image=image, caption=caption
    )
    return _with_unlisted(found) if image is not None else found


def _encoded(table: Any) -> Any:
    """The table with its images as bytes or paths, which are decoded as they are needed."""
    import datasets

    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _with_json(table: Any) -> Mapping[str, Any]:
    """The table's columns by type; one with the bytes of JSON files is known by the first that can be read."""
    features = dict(table.features)
    for name, feature in features.items():
        if name.rpartition(".")[2] == "json" and getattr(feature, "dtype", None) == "binary":
            for row in table.select_columns([name]):
                try:
                    features[name] = _shape(json_cell(row[name]))
                except (ValueError, TypeError, RecursionError):
                    continue
                break
    return features


def _shape(value: Any) -> Any:
    return {key: _shape(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def _hub_id(source: str) -> HubId | None:
    """The repository that a source names: ``owner/name``, unless there is such a path, or ``hf://datasets/owner/name``."""
    found = parse_id(source.removeprefix(HUB))
    if found is None or found.file or (not source.startswith(HUB) and Path(source).exists()):
        return None
    return found


def _from_hub(source: str, repository: HubId, split: str) -> Examples:
    import datasets

    try:
        table = datasets.load_dataset(repository.repo, revision=repository.revision, split=split)
    except Exception as error:  # the library raises many kinds
        why = reason(error.__cause__ or error)
        raise UserError(f"data.source: {source} is no local path, and not readable as a hub dataset ({why})") from None
    return Examples(source=source, table=table, version=str(table._fingerprint))


def _from_files(listing: Listing, split: str) -> Examples:
    files, folder, source = listing.files, listing.folder, listing.source
    if len(files) == 1 and file_name(files[0]) not in METADATA and _ending(files[0]) in (*SHARDS, *TEXT_TABLES):
        chosen = shards_of(listing, files, split)
        rows = _shards(source, chosen) if _ending(files[0]) in SHARDS else _tables(source, chosen)
        return dataclasses.replace(rows, folders=(folder,), left_out=listing.left_out)
    for ending in SHARDS:
        shards = [file for file in files if _ending(file) == ending and file_name(file) not in METADATA]
        if shards:
            rows = _shards(source, shards_of(listing, shards, split))
            images = tuple(file for file in files if is_readable(file) or _ending(file) in UNREAD_ENDINGS)
            return dataclasses.replace(rows, folders=(folder,), candidates=images, left_out=listing.left_out)
    chosen, apart = images_of(listing, split)
    left_out = {**listing.left_out, **{why: _names(filter(is_readable, those)) for why, those in apart.items()}}
    metadata = [file for file in chosen if file_name(file) in METADATA]
    rows = _with_metadata(source, chosen, metadata) if metadata else _with_sidecars(source, chosen)
    unread = _names(file for file in chosen if _ending(file) in UNREAD_ENDINGS)
    left_out |= {**rows.left_out, "of a format that is not read": unread}
    return dataclasses.replace(rows, left_out={why: names for why, names in left_out.items() if names})


def _ending(file: str) -> str:
    return PurePath(file_name(file)).suffix.lower()


def _names(files: Iterable[str]) -> tuple[str, ...]:
    return tuple(file_name(file) for file in files)


def _version(files: Sequence[str]) -> str:
    with ThreadPoolExecutor(READERS) as pool:
        stamps = list(pool.map(stamp, files))
    return hashlib.sha256("\n".join([*files, *stamps]).encode()).hexdigest()


def _shards(source: str, files: list[str]) -> Examples:
    """One table of parquet files or of tars."""
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet

    from hypersd_jax.data.webdataset import RawWebDataset

    kind = Parquet if _ending(files[0]) == ".parquet" else RawWebDataset
    try:
        version = _version(files)
        with _plain_names(files) as names:
            # The files as they are: by `load_dataset` their names would be patterns.
            data_files = DataFilesDict({"train": DataFilesList(names, [(version,)])})
            builder = kind(data_files=data_files, config_id=version[:16], hash=datasets.__version__)
            builder.download_and_prepare()
            table = builder.as_dataset(split="train")
    except Exception as error:  # the library raises many kinds
        raise UserError(f"data.source: {source} cannot be read ({reason(error.__cause__ or error)})") from None
    return Examples(source=source, table=table, version=version)


@contextlib.contextmanager
def _plain_names(files: Sequence[str]) -> Iterator[list[str]]:
    """The files under names that hold no ``::``, by which fsspec chains file systems."""
    if not any("::" in file and not is_url(file) for file in files):
        yield list(files)
        return
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for number, file in enumerate(files):
            link = Path(folder) / f"{number:05d}{_ending(file)}"
            link.symlink_to(os.path.abspath(file))
            names.append(str(link))
        yield names


def _tables(source: str, files: list[str]) -> Examples:
    """One table of text tables."""
    return _in_memory(source, join_tables(map(read_table, files)))


def _in_memory(source: str, columns: Mapping[str, Sequence[Any]], folders: Sequence[str] = ("",)) -> Examples:
    """A table of columns of text, or of bytes."""
    import datasets

    digest = hashlib.sha256("\n".join(folders).encode())
    features = {}
    for name, cells in columns.items():
        digest.update(f"\n{name}\n".encode())
        for cell in cells:
            digest.update(cell if isinstance(cell, bytes) else repr(cell).encode())
        raw = any(isinstance(cell, bytes) for cell in cells)
        features[name] = datasets.Value("large_binary" if raw else "large_string")
    table = datasets.Dataset.from_dict(dict(columns), features=datasets.Features(features))
    return Examples(source=source, table=table, version=digest.hexdigest())


def _with_metadata(source: str, files: Sequence[str], metadata: list[str]) -> Examples:
    """The tables of a folder, one for each folder of images, one after the other."""
    folders = [file.rpartition("/")[0] for file in metadata]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"data.source: {folder} has more than one of {', '.join(METADATA)}")
    tables = [
        _text_columns(_shards(source, [file])) if _ending(file) == ".parquet" else read_table(file) for file in metadata
    ]
    lengths = [len(next(iter(table.values()), [])) for table in tables]
    starts = tuple(sum(lengths[:index]) for index in range(len(lengths)))
    rows = _in_memory(source, join_tables(tables), folders)
    images = tuple(file for file in files if is_readable(file))
    return dataclasses.replace(rows, starts=starts, folders=tuple(folders), candidates=images)


def _text_columns(rows: Examples) -> Columns:
    """The columns of a metadata.parquet as text, but for those of bytes and nested ones."""
    found: Columns = {}
    for name in rows.table.column_names:
        cells = list(rows.table[name])
        if not any(isinstance(cell, bytes | dict) for cell in cells):
            found[name] = [caption_text({name: cell}, name) or None for cell in cells]
    return found


def _with_unlisted(rows: Examples) -> Examples:
    """Count the images of the folder that its table does not name."""
    listed = {_spelling(name) for name in rows.paths()}
    unlisted = _names(file for file in rows.candidates if _spelling(file) not in listed)
    return (
        dataclasses.replace(rows, left_out={**rows.left_out, "that the table does not name": unlisted})
        if unlisted
        else rows
    )


def _spelling(path: str) -> str:
    """One spelling of a path, however it composes accents and separates folders."""
    return unicodedata.normalize("NFC", os.path.normpath(path.replace("\\", "/")))


def _with_sidecars(source: str, files: Sequence[str]) -> Examples:
    """A table of images, each with the text file of the same name as its caption."""
    images = [file for file in files if is_readable(file)]
    texts = {_spelling(file.rpartition(".")[0]): file for file in files if _ending(file) == ".txt"}
    captions_at = [texts.get(_spelling(image.rpartition(".")[0])) for image in images]
    if not any(captions_at):
        raise UserError(
            f"data.source: {source} has no captioned images: it needs a {METADATA[0]} or .csv with file_name and "
            "text, a .txt beside each image, .parquet files, or .tar files"
        )
    with ThreadPoolExecutor(READERS) as pool:
        captions = list(pool.map(_read_text, captions_at))
    rows = _in_memory(source, {"image": images, "text": captions})
    used = set(captions_at)
    alone = _names(file for file in texts.values() if file not in used)
    return dataclasses.replace(rows, left_out={"text files without an image": alone} if alone else {})


def _read_text(file: str | None) -> bytes | None:
    """The bytes of a text file; None if it cannot be read."""
    if file is None:
        return None
    try:
        with open_file(file) as opened:
            return opened.read()
    except Exception:  # every file system has its own kinds
        return None
