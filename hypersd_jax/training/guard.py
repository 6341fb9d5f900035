"""A guard beside the training loop: it measures the student on the way, keeps the best, and may end the stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np

from hypersd_jax.training.checkpoints import Checkpointer
from hypersd_jax.training.state import TrainState
from hypersd_jax.weights.tensors import replacing

STOPPED = "stopped"
"""Metadata key of a stage's last checkpoint: why the guard ended the stage. Its state is the best one."""
HISTORY = "judged.json"
"""File beside the checkpoints: each judge's scores at each measurement."""

Scores = Mapping[str, np.ndarray]
"""(N,) scores by each judge, by name."""


class Measured(NamedTuple):
    """One measurement.

    Attributes:
        metrics: to log.
        judged: scores (N,) by each held-out judge, by name, of the same N samples (prompts and noise) each time, the
            higher the better; empty: nothing is judged, and nothing ends the stage.
    """

    metrics: Mapping[str, float]
    judged: Scores


class Watch(Protocol):
    """What a stage measures on the way."""

    @property
    def every(self) -> int:
        """Training steps from one measurement to the next; the state before the first step is measured too."""

    @property
    def tolerance(self) -> float:
        """Standard errors by which a judge may fall below its highest before the stage ends."""

    @property
    def least(self) -> float:
        """Standard deviations of a judge over the samples that it must have fallen by, too."""

    def __call__(self, state: TrainState) -> Measured:
        """Measure a state; the same state gives the same numbers."""


class Guard:
    """The best state so far by held-out judges, on disk, and the decision to stop. A context manager.

    A judge has turned when it has fallen by more than the tolerated standard errors of the mean difference to its own
    highest, sample by sample: prompts differ far more than one student from the next. So small a change can be certain,
    while a student has hardly moved, that it must be a part of the judge's spread over the samples, too. One judge is
    enough to end the stage, so that no gain of one pays for another's loss. A state is better than the best so far when
    the judges' rises, each in its standard errors, add up to more than zero.
    """

    def __init__(self, watch: Watch, folder: Path, *, updates: int) -> None:
        """Open the folder of the best checkpoint, which may hold one of this run; UserError if it cannot be written."""
        self._watch, self._updates = watch, updates
        self._best, self._path = Checkpointer(folder, keep=1), folder.parent / HISTORY
        self._measured: Measured | None = None
        self._history: dict[int, Scores] = _read(self._path)

    def is_due(self, number: int) -> bool:
        """Tell whether a state after this many steps is measured."""
        return number % self._watch.every == 0 or number == self._updates

    def measure(self, state: TrainState) -> Mapping[str, float]:
        """Measure a state and return what to log; `settle` then decides, once a checkpoint has the state."""
        self._measured = self._watch(state)
        return self._measured.metrics

    def settle(self, number: int, state: TrainState, metadata: Mapping[str, Any]) -> str | None:
        """Keep the measured state if it is the best; return in one line why the stage ends, or None.

        A resumed run measures the state that it starts from again, so that it decides as the first one did.
        """
        assert self._measured is not None
        judged, best = self._measured.judged, self._best.latest()
        if not judged or (
            best is not None and best > number
        ):  # killed after the best one, whose checkpoint was cut off
            return None
        before = {update: scores for update, scores in self._history.items() if update < number}
        self._history = {**before, number: judged}
        _write(self._path, self._history)
        if best is None or best not in self._history:
            self._keep(number, state, metadata)
            return None
        for name, scores in judged.items():
            highest = max(before, key=lambda update: before[update][name].mean(), default=number)
            rise, error = _difference(scores, self._history[highest][name])
            spread = float(self._history[min(self._history)][name].std())
            if -rise > max(self._watch.tolerance * error, self._watch.least * spread):
                return (
                    f"the held-out judge {name} has fallen by {-rise:.3g} (standard error {error:.2g}) since update "
                    f"{highest}; the student of update {best} is exported"
                )
        if best != number:
            rises = [_difference(scores, self._history[best][name]) for name, scores in judged.items()]
            if sum(rise / error if error else np.sign(rise) for rise, error in rises) > 0:
                self._keep(number, state, metadata)
        return None

    def best(self, like: Any) -> TrainState:
        """Restore the best state, with the shardings of ``like``."""
        return self._best.restore(None, like)[0]

    def _keep(self, number: int, state: TrainState, metadata: Mapping[str, Any]) -> None:
        self._best.save(number, state, metadata)
        self._best.wait()  # a checkpoint of the run is never ahead of it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._best.close()


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """By how much ``a`` (N,) is above ``b`` (N,) on average, with the standard error over the samples."""
    difference = a - b
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def _read(path: Path) -> dict[int, Scores]:
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {int(update): {name: np.asarray(each) for name, each in scores.items()} for update, scores in found.items()}


def _write(path: Path, history: Mapping[int, Scores]) -> None:
    if jax.process_index() == 0:
        plain = {
            update: {name: [float(score) for score in each] for name, each in scores.items()}
            for update, scores in history.items()
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(plain), encoding="utf-8")
