"""Shared by both sides of `benchmarks/training_step.py`: shapes, stages, the calls that each needs, and the protocol.

Imports neither JAX nor PyTorch, so that a side's memory before its model is its own library's alone.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

GIB = 2**30
TOKENS = 77
COMPARED = "tscd"
"""The stage that is written with diffusers and PEFT too."""

UPDATE = "update"
GIVEN, ADAPTER = "given.npz", "adapter.safetensors"
"""What this package's side leaves for the other: inputs and draws, and the student's first LoRA."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's size: side of its latents, and rank of the LoRAs."""

    latent: int
    rank: int


SHAPES = {
    "sd15": Shape(latent=64, rank=64),
    "sdxl": Shape(latent=128, rank=64),
    "embedded": Shape(latent=16, rank=32),
    "tiny": Shape(latent=8, rank=4),
}
COMPILE_ONLY = "0"
"""In place of how many updates there will be: the step is compiled, whatever is kept from before, and that is all."""

COMMON: dict[str, Any] = {
    "updates": 1000,
    "batch_size": 1,
    "learning_rate": 3e-4,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 1e-3,
    "clip_norm": 1e-4,  # less than any gradient has, so that clipping is compared too
    "ema": 0.95,
}
TSCD = {**COMMON, "kind": "tscd", "k": 4, "solver_steps": 40, "guidance": [5.0, 6.0]}
FAKE_UPDATES = 5
DMD = {**COMMON, "kind": "dmd", "guidance": 8.0, "fake_updates": FAKE_UPDATES}
REGRESSION = {"weight": 0.25, "teacher": "previous", "steps": 8}
FOUR = [999, 749, 499, 249]
EARLIER = "earlier steps"


@dataclass(frozen=True, kw_only=True)
class PhaseCalls:
    """The fewest UNet calls of one phase, a sample, by what they are for; it is taken ``times`` times an update.

    A forward pass is 1, whatever is differentiated in it; one that stops at the middle block is 1/2.
    """

    calls: Mapping[str, float]
    times: int = 1

    def least(self, step: int) -> float:
        """With ``step`` of the student's steps before the one that carries the gradient."""
        return self.times * sum(step if name == EARLIER else calls for name, calls in self.calls.items())


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stage's settings, the phase that trains the student, and the one before it that trains the fake score model."""

    stage: Mapping[str, Any]
    student: PhaseCalls
    fake: PhaseCalls | None = None

    @property
    def phases(self) -> tuple[PhaseCalls, ...]:
        """Both, or the one that there is."""
        return (self.student,) if self.fake is None else (self.student, self.fake)

    def derivation(self) -> str:
        """The fewest calls written out, earlier steps at their mean."""
        parts = []
        for phase in self.phases:
            text = " + ".join(f"{name} {calls:g}" for name, calls in phase.calls.items())
            parts.append(text if phase.times == 1 else f"{phase.times} x ({text})")
        total = sum(phase.times * sum(phase.calls.values()) for phase in self.phases)
        return f"{' + '.join(parts)} = {total:g}"


_CONSISTENCY = {"student": 1, "guided teacher": 2, "target": 1}
# The discriminator reads the features of the blocks down and the middle one, of both sides; the features at the step's
# start that `pair` reads too are those of the teacher's own call.
_ADVERSARIAL = {**_CONSISTENCY, "discriminator of both sides": 1}
_SCORE = {"student": 1, "guided real score": 2, "fake score": 1}
_FAKE = {"student": 1, "fake score": 1}
# One of K steps is drawn, so that (K - 1) / 2 come before it on average.
_STEPS = {EARLIER: (len(FOUR) - 1) / 2}

CASES = {
    COMPARED: Case(stage=TSCD, student=PhaseCalls(calls=_CONSISTENCY)),
    "tscd-encoder": Case(
        stage={**TSCD, "adversarial": {"weight": 0.05, "features": "encoder"}}, student=PhaseCalls(calls=_ADVERSARIAL)
    ),
    "tscd-pair": Case(
        stage={**TSCD, "adversarial": {"weight": 0.05, "features": "pair", "loss": "non_saturating"}},
        student=PhaseCalls(calls=_ADVERSARIAL),
    ),
    "dmd": Case(
        stage={**DMD, "regression": REGRESSION, "anchor": {"weight": 1.0, "solver_steps": 50}},
        student=PhaseCalls(
            calls={**_SCORE, "regression": REGRESSION["steps"], "anchor": sum(_CONSISTENCY.values())},
        ),
        fake=PhaseCalls(calls=_FAKE, times=FAKE_UPDATES),
    ),
    "dmd-data-free": Case(
        stage={**DMD, "data_free": True},
        student=PhaseCalls(calls=_SCORE),
        fake=PhaseCalls(calls=_FAKE, times=FAKE_UPDATES),
    ),
    "dmd2": Case(
        stage={**DMD, "times": FOUR, "adversarial": {"weight": 1e-3, "features": "mid", "loss": "non_saturating"}},
        # The fake side's features are the fake score's own call's.
        student=PhaseCalls(calls={**_STEPS, **_SCORE}),
        fake=PhaseCalls(calls={**_STEPS, **_FAKE, "features of images": 0.5}, times=FAKE_UPDATES),
    ),
    "tdm": Case(
        stage={**DMD, "kind": "tdm", "times": FOUR},
        student=PhaseCalls(calls={**_STEPS, **_SCORE}),
        fake=PhaseCalls(calls={**_STEPS, **_FAKE}, times=FAKE_UPDATES),
    ),
    "one-step-unet": Case(
        stage={**DMD, "student": "unet", "times": [800], "regression": REGRESSION},
        student=PhaseCalls(calls={**_SCORE, "regression": REGRESSION["steps"]}),
        fake=PhaseCalls(calls=_FAKE, times=FAKE_UPDATES),
    ),
}


def find_case(name: str, fake_updates: int) -> Case:
    """A stage, with so many fake-score steps, where it has a fake score model."""
    case = CASES[name]
    if case.fake is None:
        return case
    stage = {**case.stage, "fake_updates": fake_updates}
    return replace(case, stage=stage, fake=replace(case.fake, times=fake_updates))


def status_bytes(file: str, field: str) -> int:
    """A field of one of Linux's status files that counts kB, in bytes."""
    lines = Path(file).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def resident_peak() -> float:
    """The most memory that this process has had since `forget_peak`, and what of it is in swap now, GiB."""
    status = "/proc/self/status"
    if Path(status).exists():  # there rusage also knows what the parent held when it started this process
        return (status_bytes(status, "VmHWM") + status_bytes(status, "VmSwap")) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def forget_peak() -> None:
    """Begin `resident_peak` anew, where the system can (Linux): loading and compiling are not to count."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5", encoding="ascii")


def cpu_seconds() -> float:
    """CPU seconds of this process so far, all threads together; with other work it grows less than the clock."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def resident() -> float:
    """The memory that this process has now, GiB; where `forget_peak` does nothing, the most that it has had."""
    forget_peak()
    return resident_peak()


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A side that is ready: what there is to say of it, one update, and its peak memory in GiB.

    Without an update it would not fit in memory, or was to be compiled alone.
    """

    update: Callable[[], dict[str, float]] | None
    baseline: float
    about: dict[str, Any] = field(default_factory=dict)
    peak: Callable[[], float] = resident_peak


def serve(load: Callable[[], Loaded]) -> None:
    """Load, say what was loaded, then answer every line with one update: its seconds, peak GiB, and metrics."""
    channel = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not get between the answers
    side = load()
    memory = {"loading peak GiB": side.peak() - side.baseline}
    forget_peak()
    memory["held GiB"] = side.peak() - side.baseline
    print(json.dumps({**side.about, **memory, "fits": side.update is not None}), file=channel, flush=True)
    if side.update is None:
        return
    for _ in sys.stdin:
        begin = time.perf_counter()
        found = side.update()
        seconds = time.perf_counter() - begin
        peak = side.peak() - side.baseline
        print(json.dumps({**found, "seconds": seconds, "peak GiB": peak}), file=channel, flush=True)
