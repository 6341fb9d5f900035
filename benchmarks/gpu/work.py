"""What both sides measure of sampling, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.sides.protocol import Work

SIDES = ("this package", "diffusers")
BATCHES = (1, 8)
STEPS = (1, 4)


def each_measurement(work: Work) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the pieces of one batch size by name, those that need less memory first.

    A process cannot forget the most memory that JAX has held, so that each peak is right only if it is the largest so
    far.
    """
    yield "text", work.text
    yield "unet", _with_text(work)
    yield "decode", work.decode
    for steps in STEPS:
        yield image_name(steps), partial(work.image, steps)


def image_name(steps: int) -> str:
    """Return the name of an image's measurement."""
    return f"image, {steps} step{'s' if steps > 1 else ''}"


def _with_text(work: Work) -> Callable[[], Any]:
    """Encode the prompts on the first call alone."""
    held: list[Any] = []

    def call() -> Any:
        if not held:
            held.append(work.text())
        return work.unet(held[0])

    return call
