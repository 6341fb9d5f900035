"""The sources that an evaluation compares with: lists of prompts, and real images."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from hypersd_jax.data import EmojiSource, evaluation_images, evaluation_list
from hypersd_jax.data.left_out import LeftOut
from hypersd_jax.data.listing import list_files, reason
from hypersd_jax.data.order import shuffled
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.generator import Item
from hypersd_jax.evaluation.samples import RUN_FILE
from hypersd_jax.files import is_readable, read_image
from hypersd_jax.sampling_command import read_prompts

BASE, NONE = "base", "none"
# Seed of which real images, on which backgrounds, stand for the training data.
REAL_SEED = 20_000
# Of fewer real images, half of them for a floor, no distance is given.
LEAST = 6
# Images that are in memory in float32.
AT_A_TIME = 64


class RealImages(NamedTuple):
    """Two sets of real images with none in common, uint8 (N, H, W, 3), and a name for them, as plain data."""

    first: np.ndarray
    second: np.ndarray
    name: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class References:
    """``base``: the model's own many-step images; ``run``: a folder of an earlier evaluation; ``data``: images."""

    base: bool
    run: Path | None
    data: Path | None


def file_items(file: Path, n: int) -> tuple[Item, ...]:
    """The first ``n`` prompts of a file, one a line, each with its index as its seed."""
    prompts = read_prompts(None, file, embedded=False)[:n]
    return tuple(Item(prompt, seed) for seed, prompt in enumerate(prompts))


def embedded_items(n: int, groups: Sequence[str] | None) -> tuple[Item, ...]:
    """The first ``n`` of the embedded images' fixed list of held-out concepts."""
    return tuple(Item(item.prompt, item.seed) for item in evaluation_list(n, groups=groups))


def embedded_images(n: int, groups: Sequence[str] | None, side: int) -> np.ndarray:
    """The true images of those prompts, uint8 (N, side, side, 3)."""
    return evaluation_images(evaluation_list(n, groups=groups), resolution=side)


def read_references(given: Sequence[str]) -> References:
    """``base``, ``none``, a folder of an earlier evaluation, or one of images; at most one of each sort.

    Raises:
        UserError: a folder is neither, or there are too many.
    """
    runs = [Path(text) for text in given if (Path(text) / RUN_FILE).is_file()]
    words = [text for text in given if text in (BASE, NONE) and Path(text) not in runs]
    folders = [Path(text) for text in given if text not in words and Path(text) not in runs]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--reference {folder}: is neither {BASE}, {NONE} nor a folder")
    if len(words) + len(runs) > 1 or len(folders) > 1:
        raise UserError(f"--reference: at most one of {BASE}, {NONE} and an earlier run, and one folder of images")
    return References(base=BASE in words, run=runs[0] if runs else None, data=folders[0] if folders else None)


def training_images(n: int, groups: Sequence[str] | None, side: int) -> RealImages:
    """Embedded training images: ``n`` of each set, fewer where there are not as many."""
    source = EmojiSource(resolution=side, seed=REAL_SEED, groups=groups)
    count = min(n, len(source) // 2)
    sets = []
    for start in (0, count):
        found = np.empty((count, side, side, 3), np.uint8)
        for at in range(0, count, AT_A_TIME):
            part = source.batch(np.arange(start + at, start + min(at + AT_A_TIME, count))).images
            found[at : at + len(part)] = part
        sets.append(found)
    return RealImages(sets[0], sets[1], ["embedded", None if groups is None else list(groups), count])


def folder_images(folder: Path, n: int, size: tuple[int, int]) -> RealImages:
    """A folder's images, each cut to the shape of ``size`` (H, W) and scaled: ``n`` of each set at most.

    What cannot be read is counted and named in a warning, and others stand in.

    Raises:
        UserError: naming the folder where it holds too few.
    """
    paths = [file for file in list_files(str(folder)).files if is_readable(file)]
    too_few = f"--reference {folder}: holds {len(paths)} images, but distances need at least {LEAST}"
    if len(paths) < LEAST:
        raise UserError(too_few)
    height, width = size
    wanted = 2 * min(n, len(paths) // 2)
    found, broken = np.zeros((wanted, height, width, 3), np.uint8), LeftOut()
    order = iter(shuffled(np.arange(len(paths)), len(paths), REAL_SEED))
    count = 0
    with tqdm(total=wanted, desc="reading", unit="image") as bar:
        while count < wanted and (index := next(order, None)) is not None:
            try:
                image = read_image(paths[index])
            except Exception as error:  # Pillow raises many kinds
                broken.add("unreadable", [f"{paths[index]}: {reason(error)}"])
                continue
            found[count] = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
            count += 1
            bar.update()
    count //= 2
    said = f"; left out: {broken}" if broken else ""
    if count < LEAST // 2:
        raise UserError(f"{too_few}{said}")
    if broken:
        warnings.warn(f"--reference {folder}: left out of {len(paths)} images: {broken}", stacklevel=2)
    return RealImages(found[:count], found[count : 2 * count], hashlib.sha256(found[:count].data).hexdigest())
