"""A dataset's examples by number: where the caption and image of each are."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import io
import os
import unicodedata
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np

from hypersd_jax.data.columns import IMAGE, caption_text, column_of, image_cell
from hypersd_jax.data.listing import is_url, open_file, stamp

# Files are small, and stand on file systems that answer slowly: several are asked at once.
READERS = 16
BACKSLASH = "\\"
NO_CAPTION = "without caption"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """A dataset's examples by number, the rows of a `datasets.Dataset`.

    Attributes:
        source: as the configuration has it.
        table: the dataset.
        version: changes when one of the files that the table was read from does.
        starts, folders: from row ``starts[i]`` on, relative file names are in ``folders[i]``.
        image: the column of the images; None where there are prompts alone.
        caption: the column of the captions.
        candidates: the image files of a folder whose table decides which of them are used.
        left_out: names of the files that were found and are not among the rows, by reason.
    """

    source: str
    table: Any
    version: str
    starts: tuple[int, ...] = (0,)
    folders: tuple[str, ...] = ("",)
    image: str | None = None
    caption: str = ""
    candidates: tuple[str, ...] = ()
    left_out: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    def captions(self) -> Iterator[tuple[str, str]]:
        """Read all captions, each on one line, with what is wrong with it or ``""``; no image is read."""
        for row in self._texts:
            try:
                caption = caption_text(row, self.caption)
            except ValueError as error:
                yield "", f"whose caption is not {'valid JSON' if 'JSON' in str(error) else 'UTF-8 text'}"
            else:
                yield caption, "" if caption else NO_CAPTION

    def caption_of(self, row: int) -> str:
        """Read the caption of one row, which must be readable."""
        return caption_text(self._texts[row], self.caption)

    def name_of(self, row: int) -> str:
        """Name a row for a message: by its image's file name if it has one."""
        cell = self._images[row].get(self.image or "") if self.image else None
        path = cell.get("path") if isinstance(cell, Mapping) else cell
        if not isinstance(path, str) or not path:
            return f"row {row}"
        return path.removeprefix(f"{self.source.rstrip('/')}/").removesuffix(f".{IMAGE}")  # which a tar's image has

    def open_image(self, row: int) -> IO[bytes]:
        """Open the encoded image of a row; raises ValueError, OSError, or what a file system raises, where it fails."""
        cell = image_cell(self._images[row], self.image or "")
        return io.BytesIO(cell) if isinstance(cell, bytes) else open_file(self._located(row, cell))

    def paths(self) -> Iterator[str]:
        """List the files that the rows name, of a table that may name those in its folder."""
        if self.candidates and self._is_path(0):
            for row, cells in enumerate(self._images):
                name = cells.get(self.image)
                if isinstance(name, str) and name:
                    yield self._candidates(row, name)[0]

    @functools.cached_property
    def stamps(self) -> np.ndarray:
        """A number for the size and time of each image's file, int64 (N,): 0 where the table itself holds the image."""

        def look(row: int) -> int:
            try:
                cell = image_cell(self._images[row], self.image or "")
                text = stamp(self._located(row, str(cell)))
            except Exception:  # every file system has its own kinds
                return -1
            return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

        if not self.has_files:
            return np.zeros(len(self), np.int64)
        with ThreadPoolExecutor(READERS) as pool:
            return np.fromiter(pool.map(look, range(len(self))), np.int64, len(self))

    @property
    def contents(self) -> str:
        """A digest that changes when one of the files does: the table's, or an image's."""
        return hashlib.sha256(f"{self.version} ".encode() + self.stamps.tobytes()).hexdigest()

    @property
    def has_files(self) -> bool:
        """Whether the images are files that the table names, and not in the table itself."""
        return len(self) > 0 and self._is_path(0)

    def _is_path(self, row: int) -> bool:
        if self.image is None:
            return False
        try:
            return isinstance(image_cell(self._images[row], self.image), str)
        except ValueError:
            return False

    def _located(self, row: int, name: str) -> str:
        """The file of a name in a table; where the disk spells it otherwise, as the disk does."""
        paths = self._candidates(row, name)
        return next((path for path in paths if os.path.exists(path)), paths[0])

    def _candidates(self, row: int, name: str) -> list[str]:
        """The paths that a name may mean, from its table's folder: as it is, with slashes, with composed accents."""
        if is_url(name):
            return [name]
        folder = self.folders[bisect.bisect_right(self.starts, row) - 1]
        if is_url(folder):
            return [f"{folder}/{name.replace(BACKSLASH, '/')}"]
        names = [name, name.replace(BACKSLASH, "/")]
        names += [unicodedata.normalize(form, each) for each in names for form in ("NFC", "NFD")]
        return [each if each.startswith("/") or not folder else f"{folder}/{each}" for each in dict.fromkeys(names)]

    @functools.cached_property
    def _texts(self) -> Any:
        return self.table.select_columns([column_of(self.table.features, self.caption)])

    @functools.cached_property
    def _images(self) -> Any:
        return self.table.select_columns([column_of(self.table.features, self.image or "")])
