"""One side of a comparison: a process that does one named piece of work per line it reads, and says what it took."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Work:
    """The pieces of sampling that both sides do, of images of one size and batch.

    Attributes:
        image: ``image(steps)``, from prompts to images as NumPy arrays.
        text: encode the prompts.
        unet: one call of the UNet on what `text` gives.
        decode: latents to images as NumPy arrays.
    """

    image: Callable[..., Any]
    text: Callable[[], Any]
    unet: Callable[[Any], Any]
    decode: Callable[[], Any]

    def parts(self) -> Mapping[str, Callable[[], object]]:
        """Return what `serve` is asked for by name."""
        return {
            "image": self.image,
            "text": self.text,
            "text+unet": lambda: self.unet(self.text()),
            "decode": self.decode,
        }


def serve(load: Callable[[], Mapping[str, Callable[[], object]]]) -> None:
    """Load, then answer ``NAME`` with ``{"seconds", "peak_gib"}`` until the input ends."""
    channel = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not get between the answers

    def answer(begin: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": time.perf_counter() - begin, "peak_gib": peak}), file=channel, flush=True)

    begin = time.perf_counter()
    parts = load()
    answer(begin)
    for line in sys.stdin:
        begin = time.perf_counter()
        parts[line.strip()]()
        answer(begin)
