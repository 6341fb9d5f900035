"""The embedded images: open emoji art, one concept in up to five drawing styles, with clean names.

THIRD_PARTY_NOTICES.md says where the images come from and under which licences.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from hypersd_jax.data.order import text_fraction
from hypersd_jax.errors import UserError
from hypersd_jax.weights.components import assets

Split = Literal["train", "test", "all"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (226, 64, 60),
    "yellow": (250, 214, 90),
    "green": (104, 190, 110),
    "blue": (92, 150, 235),
    "purple": (150, 104, 206),
    "pink": (246, 164, 200),
    "black": (28, 28, 32),
}
"""The backgrounds that images are laid on, sRGB 0..255."""

TEST_FRACTION = 0.1
"""The share of concepts that training never sees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmojiRecord:
    """One image. ``concept`` is the hexcode, shared by all styles and by code points with the same image."""

    label: str
    style: str
    group: str
    subgroup: str
    tags: str
    license: str
    hexcode: str
    concept: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmojiSet:
    """``images`` uint8 (N, 64, 64, 4), RGBA with straight alpha, read-only; one record each."""

    images: np.ndarray
    records: tuple[EmojiRecord, ...]

    def __len__(self) -> int:
        return len(self.records)

    def indices(self, split: Split, groups: Iterable[str] | None = None) -> np.ndarray:
        """Find the images of a split, ``all`` being both, int64 (M,), of these groups or of all.

        Raises:
            UserError: naming a group that does not exist.
        """
        known = {record.group for record in self.records}
        wanted = known if groups is None else set(groups)
        if not wanted or wanted - known:
            wrong = ", ".join(sorted(wanted - known)) or "none"
            raise UserError(f"data.groups: {wrong} is not among {', '.join(sorted(known))}")
        chosen = [i for i, r in enumerate(self.records) if r.group in wanted and split in ("all", split_of(r))]
        return np.asarray(chosen, np.int64)


def split_of(record: EmojiRecord) -> Literal["train", "test"]:
    """A tenth of the concepts, by a hash of the concept, is held out for testing, in all its styles."""
    return "test" if text_fraction(record.concept) < TEST_FRACTION else "train"


def caption(record: EmojiRecord, colour: str) -> str:
    """``"red apple, noto style"`` on white, ``"red apple, noto style, blue background"`` on another background."""
    text = f"{record.label}, {record.style} style"
    return text if colour == "white" else f"{text}, {colour} background"


def composite(rgba: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Lay images (..., H, W, 4) uint8 with straight alpha on a background: (..., H, W, 3) uint8, rounded to nearest."""
    alpha = rgba[..., 3:].astype(np.float32) / np.float32(255)
    colours = rgba[..., :3].astype(np.float32)
    below = np.broadcast_to(np.asarray(background, np.float32), colours.shape)
    return np.round(below + (colours - below) * alpha).astype(np.uint8)


@functools.cache
def load_emoji() -> EmojiSet:
    """Read the sheets that ship with the package; about a second, once a process."""
    folder = assets() / "emoji"
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    columns = index["records"]
    records = tuple(EmojiRecord(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
    sheets = [_cut(path, index["size"]) for path in sorted(folder.glob("sheet-*.webp"))]
    images = np.concatenate(sheets)[: len(records)]
    images.setflags(write=False)
    return EmojiSet(images=images, records=records)


def _cut(path: Path, size: int) -> np.ndarray:
    """A sheet's images in reading order, (n, size, size, 4)."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    cells = pixels.reshape(rows, size, columns, size, 4).swapaxes(1, 2)
    return cells.reshape(rows * columns, size, size, 4)
