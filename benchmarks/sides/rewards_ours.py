"""This package's side: ``python -m benchmarks.sides.rewards_ours NAME MODEL FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import hypersd_jax as hs
from benchmarks.sides import parity, rewards


def eight_bits(images: np.ndarray, steps: object) -> np.ndarray:
    """The same images resized by Pillow in 8 bits, cut or padded to what the tower reads."""
    sides = images.shape[1:3]
    rows, columns = (steps.fit(side, sides, steps.size) for side in sides)
    found = np.zeros((len(images), steps.size, steps.size, 3), np.uint8)
    for image, into in zip(images, found, strict=True):
        small = Image.fromarray(image).resize((columns.resized, rows.resized), Image.Resampling.BICUBIC)
        # A crop that begins before the image fills up with black.
        box = (columns.start, rows.start, columns.start + steps.size, rows.start + steps.size)
        into[:] = np.asarray(small.crop(box))
    return found


def main() -> None:
    name, model, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    record = parity.Record("ours", folder)
    source = model / "HPS_v2.1_compressed.safetensors" if name == "hpsv2" else model
    with record.part("weights"):
        reward = hs.rewards.load(name, source)
    images = rewards.photos()

    def total(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = reward(pixels, rewards.PROMPTS)
        return jnp.sum(scores * jnp.asarray(rewards.WEIGHTS)), scores

    with record.part("score and gradient"):
        gradient, scores = jax.block_until_ready(jax.grad(total, has_aux=True)(jnp.asarray(images / 255, jnp.float32)))
    record.keep("score", scores)
    record.keep("score: d image", gradient)
    steps = reward.model.steps
    floats = hs.rewards.preprocess(jnp.asarray(images), steps) * jnp.asarray(steps.std) + jnp.asarray(steps.mean)
    small = eight_bits(images, steps)
    record.keep("8 bits: pixels", np.abs(np.asarray(floats) - small / 255).max())
    record.keep("8 bits: scores", reward(small, rewards.PROMPTS) - reward(images, rewards.PROMPTS))
    record.write()


if __name__ == "__main__":
    main()
