"""An endless stream of captioned images out of a table of examples."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from hypersd_jax.data.buckets import Stream, bucket_sizes, nearest_bucket
from hypersd_jax.data.examples import Examples
from hypersd_jax.data.fitting import fit_image
from hypersd_jax.data.image_sizes import WORKERS, image_sizes_of
from hypersd_jax.data.left_out import LeftOut
from hypersd_jax.data.listing import reason
from hypersd_jax.data.order import fraction, mix
from hypersd_jax.data.source import Batch
from hypersd_jax.errors import UserError
from hypersd_jax.files import read_image

# What a random number is for, so that one says nothing about another.
ORDER, DOWN, ACROSS, FLIP = 0, 1, 2, 3
PREVIEWS = 8


class _Found(NamedTuple):
    """A readable example of the stream."""

    row: int
    group: int
    image: Image.Image


class _Made(NamedTuple):
    """One example of a `Batch`."""

    pixels: np.ndarray
    caption: str
    sizes: np.ndarray
    row: int
    mirrored: bool


class ImageTextSource:
    """Captioned images, shuffled anew each epoch, scaled to cover the resolution or their bucket, and cropped.

    Rows without a caption are left out from the start, and where sizes are looked up (``min_size``, buckets) also
    images that are too small or have no readable header. Of others it only shows when they are read that they
    cannot be: then the next readable one of the same epoch (of the same bucket, if it has any) replaces them, those of
    its beginning following its end. So the example at a position depends on the dataset, the settings and the position
    alone, and an epoch holds every readable image, those after an unreadable one more than once.

    With buckets a batch, ``batch_size`` positions from a multiple of it on, comes from one bucket (`buckets.Stream`).
    """

    def __init__(
        self,
        rows: Examples,
        *,
        resolution: int,
        seed: int,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        min_size: int | None = None,
        bucket_step: int | None = None,
        batch_size: int = 1,
    ) -> None:
        """Choose the usable examples and sort them into buckets.

        Raises:
            UserError: nothing is usable, with the counts of why, or ``bucket_step`` does not divide the resolution.
        """
        self._rows = rows
        self._seed = seed
        self._random_crop, self._flip, self._step = crop == "random", flip, bucket_step
        self._broken: dict[int, str] = {}
        self._checked = False
        self._next_report = 1
        self._left_out = LeftOut()
        self._targets = [(resolution, resolution)]
        digest, captioned = hashlib.sha256(), []
        for row, (caption, wrong) in enumerate(rows.captions()):
            digest.update(f"{caption}\n".encode())
            if wrong:
                self._left_out.add(wrong, [rows.name_of(row)])
            else:
                captioned.append(row)
        self._identity = digest.hexdigest()
        usable = np.asarray(captioned, np.int64)
        if bucket_step or min_size:
            sizes = image_sizes_of(rows)
            usable = self._leave_out(sizes[usable, 0] == 0, usable, "unreadable")
            usable = self._leave_out(sizes[usable].min(axis=1) < (min_size or 0), usable, f"below {min_size} pixels")
        if not len(usable):
            raise self._nothing_left()
        self._members = [usable]
        if bucket_step:
            self._targets, groups = _sorted_in(sizes[usable], resolution, bucket_step)
            self._members = [usable[groups == group] for group in range(len(self._targets))]
        left_out = f"left out of {len(rows)} samples: {self._left_out}" if self._left_out else ""
        if message := "; ".join(filter(None, (left_out, self._unused_files()))):
            warnings.warn(f"data.source: {rows.source}: {message}", stacklevel=3)
        order = int(mix(seed, ORDER)[0])
        self._stream = Stream([len(members) for members in self._members], batch_size, order)
        self._pool = ThreadPoolExecutor(WORKERS, "images")
        self._find(0, 0)  # a set of which nothing can be read is refused here, not in the middle of a run

    def __len__(self) -> int:
        """Count the examples of an epoch."""
        return sum(map(len, self._members))

    @property
    def preview_prompts(self) -> list[str]:
        """The dataset's first captions."""
        first = np.sort(np.concatenate([members[:PREVIEWS] for members in self._members]))[:PREVIEWS]
        return [self._rows.caption_of(int(row)) for row in first]

    @property
    def identity(self) -> str:
        """The SHA-256 of all captions."""
        return self._identity

    @property
    def contents(self) -> str:
        """A digest of the sizes and times of the set's files."""
        return self._rows.contents

    @property
    def uncacheable(self) -> str | None:
        """Why examples cannot be encoded once and kept; None where they can."""
        if self._random_crop or self._flip:
            return f"data.{'crop=random' if self._random_crop else 'flip=true'} makes every epoch's images different"
        return "data.bucket_step makes images of several sizes" if self._step else None

    @functools.cached_property
    def files(self) -> Mapping[int, str] | None:
        """The name of each image's file, by its row of the table; None where the table itself holds the images."""
        if not self._rows.has_files:
            return None
        return {row: self._rows.name_of(row) for row in map(int, np.concatenate(self._members))}

    def batch(self, positions: np.ndarray) -> Batch:
        """Read the examples at these positions (B,), in several threads; with buckets they must be of one batch.

        Raises:
            UserError: the positions are of several buckets, or no image of theirs can be read.
        """
        positions = np.asarray(positions, np.int64)
        groups, offsets = self._stream.locate(positions)
        if len(np.unique(groups)) > 1:
            raise UserError("data.bucket_step: aspect buckets serve whole batches only, of stages with one batch_size")

        def make(index: int) -> _Made:
            found = self._find(int(groups[index]), int(offsets[index]))
            return self._fit(found, int(positions[index]))

        made = self._made(make, len(positions))
        self._report()
        return made

    def keys(self, positions: np.ndarray) -> np.ndarray:
        """Find the rows of the table at these positions (B,).

        The first call decodes every image, to know which can be read; the outcome is kept (`data.image_sizes`).
        """
        self._check_all()
        groups, offsets = self._stream.locate(positions)
        return np.asarray([self._row(int(g), int(p)) for g, p in zip(groups, offsets, strict=True)], np.int64)

    def captions(self, keys: np.ndarray) -> list[str]:
        """Read the captions in these rows (B,) of the table."""
        return [self._rows.caption_of(int(row)) for row in keys]

    def variants(self) -> np.ndarray:
        """List the rows of the table that can be read."""
        self._check_all()
        rows = np.sort(np.concatenate(self._members))
        return rows[~np.isin(rows, list(self._broken))].astype(np.int64)

    def variant_batch(self, keys: np.ndarray) -> Batch:
        """Read the examples in these rows (B,) of the table.

        Raises:
            UserError: saying why rows have no fixed images, or naming one that cannot be read.
        """
        if self.uncacheable:
            raise UserError(self.uncacheable)

        def make(index: int) -> _Made:
            row = int(keys[index])
            try:
                found = _Found(row, 0, self._open(row))
            except Exception as error:  # Pillow and the file systems raise many kinds
                name = self._rows.name_of(row)
                raise UserError(f"data.source: {self._rows.source}: {name} cannot be read ({reason(error)})") from None
            return self._fit(found, 0)

        return self._made(make, len(keys))

    def _made(self, make: Callable[[int], _Made], count: int) -> Batch:
        pixels, captions, sizes, rows, mirrored = zip(*self._pool.map(make, range(count)), strict=True)
        keys = np.asarray(rows, np.int64)
        return Batch(np.stack(pixels), list(captions), np.stack(sizes), keys, np.asarray(mirrored, bool))

    def _fit(self, found: _Found, position: int) -> _Made:
        random = {what: float(fraction(mix(self._seed, what, position))[0]) for what in (DOWN, ACROSS, FLIP)}
        corner = (random[DOWN], random[ACROSS]) if self._random_crop else None
        flip = self._flip and random[FLIP] < 0.5
        pixels, sizes = fit_image(found.image, self._targets[found.group], corner, flip=flip)
        return _Made(pixels, self._rows.caption_of(found.row), sizes, found.row, flip)

    def _open(self, row: int) -> Image.Image:
        with self._rows.open_image(row) as file:
            return read_image(file)

    def _find(self, group: int, offset: int) -> _Found:
        """The example at an offset into a group's stream, or the next that can be read."""
        while True:
            row = self._row(group, offset)
            try:
                return _Found(row, group, self._open(row))
            except Exception as error:  # Pillow and the file systems raise many kinds
                self._broken[row] = reason(error)

    def _row(self, group: int, offset: int) -> int:
        """The row at an offset into a group's stream, or the next that is not known to be broken."""
        members = self._members[group]
        for after in range(len(members)):
            row = int(members[self._stream.item(group, offset, after)])
            if row not in self._broken:
                return row
        # A bucket of which nothing can be read: any image, cropped more, rather than the end of the run.
        for row in map(int, np.concatenate(self._members)):
            if row not in self._broken:
                return row
        raise self._nothing_left()

    def _check_all(self) -> None:
        """Know every image that cannot be read."""
        if self._checked:
            return
        usable = np.concatenate(self._members)
        unread = usable[image_sizes_of(self._rows, decode=True)[usable, 0] == 0]
        self._broken = {int(row): "cannot be decoded" for row in unread} | self._broken
        self._checked = True
        self._report()

    def _leave_out(self, out: np.ndarray | list[bool], rows: np.ndarray, why: str) -> np.ndarray:
        """The rows that stay."""
        out = np.asarray(out, bool)
        self._left_out.add(why, (self._rows.name_of(int(row)) for row in rows[out]))
        return rows[~out]

    def _report(self) -> None:
        """Warn how many images could not be read so far: at the first one, and at each tenfold."""
        count = len(self._broken)
        if count < self._next_report:
            return
        self._next_report = 10 ** len(str(count))
        row, why = next(iter(self._broken.items()))
        warnings.warn(
            f"data.source: {self._rows.source}: {count} unreadable images so far, others stand in for them "
            f"({self._rows.name_of(row)}: {why})",
            stacklevel=4,
        )

    def _unused_files(self) -> str:
        files = LeftOut()
        for why, names in self._rows.left_out.items():
            files.add(why, names)
        return f"files that are not used: {files}" if files else ""

    def _nothing_left(self) -> UserError:
        unread = (f"{self._rows.name_of(row)}: {why}" for row, why in self._broken.items())
        self._left_out.add("unreadable", unread)
        counts = "; ".join(filter(None, (str(self._left_out), self._unused_files()))) or "it is empty"
        return UserError(
            f"data.source: {self._rows.source}: none of its {len(self._rows)} samples can be used: {counts}"
        )


def _sorted_in(sizes: np.ndarray, resolution: int, step: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The buckets that images (N, 2) fall into, and each one's index among them, (N,)."""
    try:
        buckets = bucket_sizes(resolution, step)
    except ValueError as error:
        raise UserError(f"data.{error}") from None
    used, groups = np.unique(nearest_bucket(sizes, buckets), return_inverse=True)
    return [buckets[index] for index in used], groups
