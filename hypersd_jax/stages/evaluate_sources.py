"""What an evaluation compares with: the list of prompts, real pictures, and an earlier run."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from hypersd_jax.data import EmojiSource, evaluation_images, evaluation_list
from hypersd_jax.data.left_out import LeftOut
from hypersd_jax.data.listing import list_files, reason
from hypersd_jax.data.order import shuffled
from hypersd_jax.errors import UserError
from hypersd_jax.files import is_readable, read_image
from hypersd_jax.sampling_command import read_prompts
from hypersd_jax.stages.evaluate_drawing import Drawn, Prompted, joined, load_chunk
from hypersd_jax.weights.tensors import replacing

BASE, NONE = "base", "none"
RUN_FILE = "run.json"
# Seed of which real pictures, on which grounds, stand for the training data.
REAL_SEED = 20_000
# Pictures that are in memory in float32.
AT_A_TIME = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
    """What is drawn; ``real`` uint8 (N, H, W, 3) are the true pictures of the prompts, where there are any."""

    items: tuple[Prompted, ...]
    real: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class References:
    """``base``: the model's own many-step pictures; ``run``: a folder of an earlier evaluation; ``data``: pictures."""

    base: bool
    run: Path | None
    data: Path | None


def own_list(file: Path, n: int) -> Listed:
    """The first ``n`` prompts of a file, one a line, each with its place as its seed."""
    prompts = read_prompts(None, file, embedded=False)[:n]
    return Listed(items=tuple(Prompted(prompt, seed) for seed, prompt in enumerate(prompts)), real=None)


def embedded_list(n: int, groups: Sequence[str] | None, side: int) -> Listed:
    """The first ``n`` of the embedded pictures' fixed list of held-out concepts, with the pictures at ``side`` px."""
    items = evaluation_list(n, groups=groups)
    listed = tuple(Prompted(item.prompt, item.seed) for item in items)
    return Listed(items=listed, real=evaluation_images(items, resolution=side))


def read_references(given: Sequence[str]) -> References:
    """``base``, ``none``, a folder of an earlier evaluation, or one of pictures; at most one of each sort.

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
        raise UserError(f"--reference: at most one of {BASE}, {NONE} and an earlier run, and one folder of pictures")
    return References(base=BASE in words, run=runs[0] if runs else None, data=folders[0] if folders else None)


def training_pictures(n: int, groups: Sequence[str] | None, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of the embedded training pictures with none in common, uint8: ``n`` each, fewer where there are not."""
    source = EmojiSource(resolution=side, seed=REAL_SEED, groups=groups)
    count = min(n, len(source) // 2)
    sets = []
    for start in (0, count):
        found = np.empty((count, side, side, 3), np.uint8)
        for at in range(0, count, AT_A_TIME):
            part = source.batch(np.arange(start + at, start + min(at + AT_A_TIME, count))).images
            found[at : at + len(part)] = np.round((part + 1.0) * 127.5)
        sets.append(found)
    return sets[0], sets[1]


def folder_pictures(folder: Path, n: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of a folder's images with none in common, uint8, each cut to the shape of ``size`` (H, W) and scaled.

    What cannot be read is counted and named in a warning, and others stand in.

    Raises:
        UserError: naming the folder where it holds too few.
    """
    paths = [file for file in list_files(str(folder)).files if is_readable(file)]
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
    if count < 3:
        raise UserError(f"--reference {folder}: holds {len(paths)} images, but distances need at least 6{said}")
    if broken:
        warnings.warn(f"--reference {folder}: left out of {len(paths)} images: {broken}", stacklevel=2)
    return found[:count], found[count : 2 * count]


def save_run(folder: Path, items: Sequence[Prompted], drawn: Drawn) -> None:
    """Write which pictures a run drew and where they are kept, for a later evaluation to compare with."""
    inside = folder.resolve()
    paths = [path.resolve() for path in drawn.chunks]
    listed = [str(path.relative_to(inside)) if path.is_relative_to(inside) else str(path) for path in paths]
    content = {"items": [list(item) for item in items], "chunks": listed}
    with replacing(folder / RUN_FILE) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_run(folder: Path, size: tuple[int, int]) -> tuple[tuple[Prompted, ...], Drawn]:
    """The list and pictures of an earlier evaluation, whose pictures must be of this ``size`` (H, W).

    Raises:
        UserError: naming the file that is missing or damaged, or the folder with another size.
    """
    path = folder / RUN_FILE
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        items = tuple(Prompted(str(prompt), int(seed)) for prompt, seed in content["items"])
        paths = [folder / str(name) for name in content["chunks"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as an earlier evaluation ({error})") from None
    drawn = joined([load_chunk(chunk) for chunk in paths], paths) if paths else None
    if drawn is None or len(drawn.images) != len(items):
        raise UserError(f"{path}: its pictures are not those of its list; run that evaluation again")
    height, width = drawn.images.shape[1:3]
    if (height, width) != size:
        raise UserError(
            f"--reference {folder}: its pictures are {width} x {height} pixels, these {size[1]} x {size[0]}"
        )
    return items, drawn
