"""Measure an embedded model on held-out prompts: ``python benchmarks/embedded/measure.py --model M --output FOLDER``.

`hypersd evaluate` at the teacher's settings (25 steps of ddim, guidance 4), of which any may be given anew, with a
column more: by how much the background's colour is off.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from hypersd_jax.cli import main as hypersd
from hypersd_jax.data import COLOURS
from hypersd_jax.evaluation import Column, register_column

USUAL = ("--steps", "25", "--sampler", "ddim", "--guidance", "4", "--reference", "none")
CORNER = 2
"""Side of the squares in the four corners that are looked at, in pixels."""


def named_background(prompt: str) -> str:
    """Return the background that a caption of the embedded images names; white where it names none."""
    last = prompt.rpartition(", ")[2].removesuffix(" background")
    return last if last in COLOURS else "white"


def background_errors(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Compute by how much images (N, H, W, 3) are off the background that they were asked for, (N,) in 1/255.

    The median over the corners' pixels of the mean absolute difference over the channels: an image may fill a corner.
    """
    sides = (slice(None, CORNER), slice(-CORNER, None))
    corners = np.concatenate([images[:, y, x].reshape(len(images), -1, 3) for y in sides for x in sides], axis=1)
    wanted = np.asarray([COLOURS[named_background(prompt)] for prompt in prompts], np.float64)
    return np.median(np.mean(np.abs(corners - wanted[:, None]), axis=2), axis=1)


BACKGROUND_ERROR = Column(
    key="background_error",
    heading="Background off by",
    digits=1,
    better="lower",
    note="Background off by: mean absolute difference of the corners to the colour that the prompt names, in 1/255.",
    measure=lambda found: background_errors(found.images, found.prompts),
    needs=("match",),
)


def main(arguments: Sequence[str]) -> None:
    """Evaluate with the column."""
    register_column(BACKGROUND_ERROR)
    hypersd(["evaluate", *USUAL, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
