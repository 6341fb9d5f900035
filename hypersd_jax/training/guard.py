"""A guard beside the training loop: it measures the student on the way, keeps the best, and may end the stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from hypersd_jax.training.checkpoints import Checkpointer
from hypersd_jax.training.state import TrainState

STOPPED = "stopped"
"""Metadata key of a stage's last checkpoint: why the guard ended the stage. Its state is the best one."""
JUDGED = "judged"
"""Metadata key of the best checkpoint: the judge's scores of its samples."""


class Measured(NamedTuple):
    """One measurement.

    Attributes:
        metrics: to log.
        judged: (N,) a held-out judge's scores of the same N samples (prompts and noise) each time, the higher the
            better; None: nothing is judged, and nothing ends the stage.
    """

    metrics: Mapping[str, float]
    judged: np.ndarray | None


class Watch(Protocol):
    """What a stage measures on the way."""

    @property
    def every(self) -> int:
        """Training steps from one measurement to the next; the state before the first step is measured too."""

    @property
    def tolerance(self) -> float:
        """Standard errors by which the judge may fall below its best before the stage ends."""

    def __call__(self, state: TrainState) -> Measured:
        """Measure a state; the same state gives the same numbers."""


class Guard:
    """The best state so far by a held-out judge, on disk, and the decision to stop. A context manager.

    The judge has turned when it has fallen by more than the tolerated standard errors of the mean difference to its
    best, sample by sample: prompts differ far more than one student from the next.
    """

    def __init__(self, watch: Watch, folder: Path, *, updates: int) -> None:
        """Open the folder of the best checkpoint, which may hold one of this run; UserError if it cannot be written."""
        self._watch, self._updates = watch, updates
        self._best = Checkpointer(folder, keep=1)
        self._measured: Measured | None = None

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
        if judged is None:
            return None
        if best is None:
            self._keep(number, state, metadata, judged)
            return None
        fallen = np.asarray(self._best.metadata()[JUDGED]) - np.asarray(judged, np.float64)
        fall, error = float(fallen.mean()), float(fallen.std(ddof=1) / np.sqrt(len(fallen)))
        if fall > self._watch.tolerance * error:
            return (
                f"the held-out judge has fallen by {fall:.3g} (standard error {error:.2g}) since update {best}, whose "
                f"student is exported"
            )
        if fall < 0:
            self._keep(number, state, metadata, judged)
        return None

    def best(self, like: Any) -> TrainState:
        """Restore the best state, with the shardings of ``like``."""
        return self._best.restore(None, like)[0]

    def _keep(self, number: int, state: TrainState, metadata: Mapping[str, Any], judged: np.ndarray) -> None:
        scores = [float(score) for score in judged]
        self._best.save(number, state, {**metadata, JUDGED: scores})
        self._best.wait()  # a checkpoint of the run is never ahead of it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._best.close()
