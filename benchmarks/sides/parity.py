"""Shared by both sides of `benchmarks/full_parity.py`: the inputs, and how each side writes what it found.

Arrays are float32 in this package's layouts: images and latents (B, H, W, C), `down` (.., in, r), `up` (r, out).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

LATENT, PIXELS = 32, 256
TIMESTEP = 500
STEPS = (1, 4)
PROMPTS = ["red apple, fluent flat style", "a cat face, noto style, blue background"]
TOKENS, VOCABULARY = 77, 49408
RANK, ALPHA = 4, 3.0
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
MODULES = (
    *(f"{ATTENTION}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "down_blocks.1.resnets.0.conv1",
)
"""What the adapter adapts; both families have these modules."""

WIDTHS = {"sd15": {"context": 768}, "sdxl": {"context": 2048, "pooled": 1280}}
TIME_IDS = [[768.0, 1024.0, 16.0, 32.0, 1024.0, 896.0]]


def inputs(family: str) -> dict[str, np.ndarray]:
    """Draw the inputs, alike in both processes; ``weights`` and ``image_weights`` are of the differentiated sums."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    found = {
        "latents": normal(1, LATENT, LATENT, 4),
        "weights": normal(1, LATENT, LATENT, 4),
        "image": random.uniform(-1, 1, (1, PIXELS, PIXELS, 3)).astype(np.float32),
        "image_weights": normal(1, PIXELS, PIXELS, 3),
        "context": normal(1, TOKENS, WIDTHS[family]["context"]),
        "ids": random.integers(0, VOCABULARY, (1, TOKENS)).astype(np.int32),
    }
    if family == "sdxl":
        found["pooled"] = normal(1, WIDTHS[family]["pooled"])
        found["time_ids"] = np.asarray(TIME_IDS, np.float32)
    return found


class Record:
    """Arrays by name and seconds by part of one side, written as ``NAME.npz`` and ``NAME.json``."""

    def __init__(self, side: str, folder: Path) -> None:
        self.path = folder / side
        self.arrays: dict[str, np.ndarray] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the work, loading and compiling included."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin
        print(f"{self.path.name}: {name} {self.seconds[name]:.1f} s, peak {_peak_gib():.2f} GiB", file=sys.stderr)

    def keep(self, name: str, array: Any) -> None:
        """Keep a copy of one result."""
        self.arrays[name] = np.array(array)

    def write(self) -> None:
        """Write everything."""
        np.savez(self.path.with_suffix(".npz"), **self.arrays)
        about = {"seconds": self.seconds, "peak_gib": _peak_gib()}
        self.path.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
