"""The guard: which state it keeps, when it stops, and that a resumed run decides as one that was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypersd_jax import training
from hypersd_jax.training import Measured
from hypersd_jax.training.guard import Guard
from tests.helpers import toy_training as toy

SPREAD = np.array([0.02, -0.01, 0.0, -0.01])


class Judges:
    """A watch whose judges say what is written down for each step."""

    every, tolerance = 1, 2.0

    def __init__(self, scores: Mapping[str, Sequence[float]], least: float = 0.0) -> None:
        self._scores, self.least = scores, least

    def __call__(self, state: Any) -> Measured:
        step = int(state.step)
        # Prompts differ by far more than one student from the next.
        of_prompts = np.array([0.0, 50.0, -30.0, 7.0])
        judged = {name: each[step] + of_prompts + step * SPREAD for name, each in self._scores.items()}
        return Measured({}, judged)


def followed(
    folder: Path, scores: Mapping[str, Sequence[float]], *, begin: int = 0, end: int = 99
) -> tuple[str | None, int | None]:
    """Train and measure from one step to another; (why it stopped, the step of the best state)."""
    run, reason = toy.Run(), None
    run.go(begin)
    updates = min(end, len(next(iter(scores.values()))) - 1)
    with Guard(Judges(scores), folder / "best", updates=updates) as guard:
        for step in range(begin, updates + 1):
            guard.measure(run.state)
            reason = guard.settle(step, run.state, {"stage": "s"})
            if reason or step == updates:
                break
            run.go(1)
        return reason, int(guard.best(training.abstract(run.mesh, run.state)).step)


@pytest.mark.parametrize(
    ("scores", "best", "said"),
    [
        ({"a": [1.0, 2.0, 3.0]}, 2, None),
        ({"a": [1.0, 2.0, 1.99]}, 1, None),  # within the errors
        ({"a": [1.0, 3.0, 2.0]}, 1, "judge a has fallen by 1 "),
        # One judge that falls is enough, however much the other gains.
        ({"a": [1.0, 5.0, 9.0], "b": [1.0, 1.5, 1.0]}, 1, "judge b has fallen by 0.5"),
        # Together they rise, though one sinks a little; and it has sunk too far, below its own highest, at the end.
        ({"a": [1.0, 2.0, 3.0, 4.0], "b": [1.0, 0.99, 0.98, 0.78]}, 2, "judge b has fallen by 0.22 "),
    ],
)
def test_what_is_kept_and_when_it_stops(
    tmp_path: Path, scores: Mapping[str, Sequence[float]], best: int, said: str | None
) -> None:
    reason, found = followed(tmp_path, scores)
    assert found == best
    if said is None:
        assert reason is None
        return
    assert reason is not None
    assert said in reason
    assert f"the student of update {best} is exported" in reason


@pytest.mark.parametrize(("least", "stops"), [(0.0, True), (0.03, True), (0.04, False)])
def test_a_fall_that_is_certain_and_of_no_account(tmp_path: Path, least: float, stops: bool) -> None:
    """By 1, where the scores' standard deviation over the prompts is 28.7."""
    run = toy.Run()
    judges = Judges({"a": [3.0, 2.0]}, least)
    with Guard(judges, tmp_path / "best", updates=5) as guard:
        guard.measure(run.state)
        assert guard.settle(0, run.state, {}) is None
        run.go(1)
        guard.measure(run.state)
        assert (guard.settle(1, run.state, {}) is not None) == stops


def test_a_resumed_run_remembers_each_judges_highest(tmp_path: Path) -> None:
    """Also one that was no best state."""
    scores = {"a": [1.0, 2.0, 1.99, 1.99, 1.99], "b": [1.0, 1.0, 1.005, 0.985, 0.985]}
    whole = followed(tmp_path / "whole", scores)
    assert whole[0] is not None
    assert "judge b has fallen by 0.02 " in whole[0]
    assert "since update 2; the student of update 1 is exported" in whole[0]
    for stopped in (1, 2):
        folder = tmp_path / str(stopped)
        assert followed(folder, scores, end=stopped)[0] is None
        assert followed(folder, scores, begin=stopped) == whole


def test_a_measurement_that_the_run_makes_again_does_not_count_before(tmp_path: Path) -> None:
    """Killed after the best state was kept and before the run had a checkpoint of it."""
    scores = {"a": [1.0, 2.0, 9.0, 10.0]}
    assert followed(tmp_path, scores, end=2) == (None, 2)
    assert followed(tmp_path, scores, begin=1) == (None, 3)


def test_without_judges_nothing_is_kept(tmp_path: Path) -> None:
    run = toy.Run()
    with Guard(Judges({}), tmp_path / "best", updates=3) as guard:
        guard.measure(run.state)
        assert guard.settle(0, run.state, {}) is None
    assert not (tmp_path / "judged.json").exists()
