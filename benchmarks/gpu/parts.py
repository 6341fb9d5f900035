"""The parts of the benchmark, in their order, and the time of each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import product

INTERPRETERS = ("PYTHON", "TORCH_PYTHON")
"""Names of the interpreters, and the variables that name them: this package's, and that of diffusers on PyTorch."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process: a sub-command of `benchmarks.gpu`.

    Attributes:
        name: in rows, tables and GPU_PARTS.
        arguments: the sub-command and its arguments.
        share: of the time, in any unit. What a part does not need, the later ones may use; a share of 0 is that alone.
        python: one of `INTERPRETERS`.
    """

    name: str
    arguments: Sequence[str]
    share: float
    python: str = INTERPRETERS[0]


def _training(family: str, case: str, batch: int, *, remat: bool, share: float) -> Part:
    name = f"{family}-{case}-{batch}{'-remat' * remat}"
    arguments = ["train", family, case, str(batch), *["--remat"] * remat]
    return Part(name=name, arguments=arguments, share=share)


TRAINING = 60.0
"""A training step's share: most of it is compilation."""
FIRST = (("tscd", 4, False), ("dmd", 4, True))
"""The training steps that are measured first, should time run out."""
NEXT = ("tscd", 4, True)
"""The first of the others, which share its time."""
PARTS = (
    Part(name="environment", arguments=["environment"], share=15),
    Part(name="tests", arguments=["tests"], share=65),
    Part(name="sd15", arguments=["sample", "sd15"], share=110),
    Part(name="sd15-torch", arguments=["sample-torch", "sd15"], share=80, python=INTERPRETERS[1]),
    Part(name="sdxl", arguments=["sample", "sdxl"], share=110),
    Part(name="sdxl-torch", arguments=["sample-torch", "sdxl"], share=80, python=INTERPRETERS[1]),
    *(_training("sd15", case, batch, remat=remat, share=TRAINING) for case, batch, remat in FIRST),
    _training("sdxl", "tscd", 1, remat=True, share=70),
    *(
        _training("sd15", case, batch, remat=remat, share=30 if (case, batch, remat) == NEXT else 0)
        for case, batch, remat in product(("tscd", "dmd"), (4, 1), (False, True))
        if (case, batch, remat) not in FIRST
    ),
    Part(name="attention", arguments=["attention"], share=30),
)
"""Each has its share, and what those before it have left. Shares are about seconds of twelve minutes."""


def chosen(names: Collection[str]) -> list[Part]:
    """Return the parts of these names, in their order; all of them where there are no names.

    One that is asked for by name has a share in any case.

    Raises:
        ValueError: a name that no part has.
    """
    known = [part.name for part in PARTS]
    if unknown := sorted({*names} - {*known}):
        raise ValueError(f"GPU_PARTS: no part is called {unknown[0]}; there are {' '.join(known)}")
    if not names:
        return list(PARTS)
    return [replace(part, share=part.share or TRAINING) for part in PARTS if part.name in names]
