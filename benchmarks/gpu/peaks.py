"""Published peaks of graphics cards, and how much of one a program reaches."""

from __future__ import annotations

TERA = 1e12

DENSE_BF16 = {
    "A10": 125.0,
    "A100": 312.0,
    "B200": 2250.0,
    "H100": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "L4": 121.0,
    "L40S": 362.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
}
"""TFLOP/s of bfloat16 products summed in float32, without sparsity, from NVIDIA's data sheets and white papers.

The data sheets' figures for the H and B series are with sparsity: these are half of them.
"""


OTHERS = {"MIG", "D", "Ti", "SUPER", "Max", "Laptop"}
"""Words of a name that say that it is a part, or another version, of the card in the table."""


def peak_of(device: str) -> float | None:
    """Return a card's peak in TFLOP/s by its name as JAX has it; None where the table has no such card."""
    words = device.replace("-", " ").split()
    if OTHERS & {*words}:
        return None
    named = [name for name in DENSE_BF16 if _within(name.split(), words)]
    return DENSE_BF16[max(named, key=len)] if named else None


def mfu(flops: float | None, seconds: float, device: str) -> float | None:
    """Return FLOPs a second over the card's peak; None for an unknown card, or where FLOPs are not known."""
    peak = peak_of(device)
    return None if peak is None or flops is None else flops / seconds / (peak * TERA)


def _within(name: list[str], words: list[str]) -> bool:
    """Whether the words of a name stand next to each other: L40S is no L4."""
    return any(words[i : i + len(name)] == name for i in range(len(words)))
