"""Shared by both sides of `benchmarks/reward_parity.py`: images, prompts and what is measured."""

from __future__ import annotations

import numpy as np
from matplotlib import cbook
from PIL import Image

NAMES = ("aesthetic", "pickscore", "hpsv2", "imagereward")
HEIGHT, WIDTH = 300, 411
PROMPTS = ["a portrait of an officer in uniform", "red apple, fluent flat style, on a table beside a window"]
WEIGHTS = (1.0, -2.0)
"""Of the two scores in the sum whose gradient is compared."""

MARKS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}


def photos() -> np.ndarray:
    """Two parts of a photograph that comes with matplotlib, (2, H, W, 3) uint8."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        pixels = np.asarray(image.convert("RGB"))
    return np.stack([pixels[top : top + HEIGHT, 40 : 40 + WIDTH] for top in (20, 250)])


def vocabulary() -> str:
    """A `vocab.txt` of bert-base-uncased's size and marks, with the prompts' words where that has others."""
    words = sorted(set(" ".join(PROMPTS).replace(",", " , ").split()))
    lines = [MARKS.get(index, f"[unused{index}]") for index in range(30522)]
    lines[1000 : 1000 + len(words)] = words
    return "\n".join(lines) + "\n"
