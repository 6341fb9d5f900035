"""Published peaks of accelerators; imports no JAX, so that a wrong name is refused at once."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """What the maker publishes of one chip.

    Attributes:
        flops: dense bfloat16 operations a second.
        bandwidth: of its memory, bytes a second.
        memory: bytes.
        kinds: how JAX's ``device_kind`` begins on it.
    """

    flops: float
    bandwidth: float
    memory: float
    kinds: tuple[str, ...]


def _peaks(tera: float, giga_a_second: float, giga: float, *kinds: str) -> Peaks:
    return Peaks(flops=tera * 1e12, bandwidth=giga_a_second * 1e9, memory=giga * 1e9, kinds=kinds)


DEVICES: dict[str, Peaks] = {
    "v4": _peaks(275, 1228, 32, "TPU v4"),
    "v5e": _peaks(197, 819, 16, "TPU v5 lite", "TPU v5e"),
    "v5p": _peaks(459, 2765, 95, "TPU v5p", "TPU v5"),
    "v6e": _peaks(918, 1640, 32, "TPU v6 lite", "TPU v6e"),
    "a100-40gb": _peaks(312, 1555, 40, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    "a100": _peaks(312, 2039, 80, "NVIDIA A100"),
    "h100": _peaks(989, 3350, 80, "NVIDIA H100"),
    "h200": _peaks(989, 4800, 141, "NVIDIA H200"),
    "l4": _peaks(121, 300, 24, "NVIDIA L4"),
    "l40s": _peaks(362, 864, 48, "NVIDIA L40S"),
}
"""By the name that ``--device`` takes; of GPUs the SXM form where there are several."""

CPU = "cpu"
NAMES = (*DEVICES, CPU)


def name_of(kind: str) -> str | None:
    """Return the name of the device that JAX calls ``kind``; None where its peaks are not listed.

    The longest beginning counts, so that an L40S is no L4.
    """
    known = [(len(start), name) for name, peaks in DEVICES.items() for start in peaks.kinds if kind.startswith(start)]
    return max(known)[1] if known else None
