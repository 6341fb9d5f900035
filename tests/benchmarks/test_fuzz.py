"""Some hundred of the files that `benchmarks/fuzz_loaders.py` makes by the hundred thousand, and their verdicts."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fuzz import bases, verdicts
from benchmarks.fuzz.loads import Unsound
from benchmarks.fuzz.samples import Sample, samples
from hypersd_jax.errors import UserError

SEED, FILES = 20, 400


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Sample], dict[str, Path]]]:
    """The sound samples, and the folder that each is in."""
    with bases.built_once():
        found = samples()
        yield found, {sample.kind: bases.write(tmp_path_factory.mktemp("fuzz"), sample.files) for sample in found}


def test_sound_files_load(every: tuple[list[Sample], dict[str, Path]]) -> None:
    for sample in every[0]:
        sample.load(every[1][sample.kind] / sample.target)
    assert len(every[0]) == len(every[1]) > 20


def test_mutated_files_are_refused_or_load_soundly(every: tuple[list[Sample], dict[str, Path]]) -> None:
    outcomes: Counter[str] = Counter()
    for number in range(FILES):
        mutated = verdicts.mutate(every[0], SEED, number)
        with verdicts.placed(mutated, every[1][mutated.sample.kind]) as path:
            verdict = verdicts.verdict_of(mutated, path)
        assert verdict.outcome != "wrong", f"{mutated.sample.kind}, {mutated.mutation}: {verdict.reason}"
        outcomes[verdict.outcome] += 1
    assert outcomes["refused"] > FILES / 2
    assert outcomes["loaded"] > FILES / 10
    test_sound_files_load(every)  # each was put back


def test_a_number_is_always_the_same_file(every: tuple[list[Sample], dict[str, Path]]) -> None:
    first, again, other = (verdicts.mutate(every[0], seed, 7) for seed in (1, 1, 2))
    assert (first.sample.kind, first.mutation, first.changed) == (again.sample.kind, again.mutation, again.changed)
    assert first.changed != other.changed


def _fail(error: BaseException) -> None:
    raise error


def _fill(size: int) -> None:
    np.ones(size, np.uint8)


@pytest.mark.parametrize(
    ("load", "outcome", "reason"),
    [
        (lambda: None, "loaded", ""),
        (lambda: _fail(UserError("x.json: no")), "refused", "x.json: no"),
        (lambda: _fail(UserError("x" * 9999)), "wrong", "a refusal of 9999 characters"),
        (lambda: _fail(KeyError("x")), "wrong", "KeyError"),
        (lambda: _fail(MemoryError()), "wrong", "MemoryError"),
        (lambda: _fail(SystemExit(1)), "wrong", "SystemExit"),
        (lambda: _fail(Unsound("NaN")), "wrong", "Unsound"),
        (lambda: time.sleep(20), "wrong", "Hang"),
        (lambda: _fill(100 * 2**20), "wrong", "100 MB"),
    ],
)
def test_the_verdicts_themselves(
    every: tuple[list[Sample], dict[str, Path]],
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[], None],
    outcome: str,
    reason: str,
) -> None:
    monkeypatch.setattr(verdicts, "SECONDS", 2.0)
    mutated = verdicts.mutate(every[0], SEED, 0)
    sample = dataclasses.replace(mutated.sample, load=lambda _path: load())
    verdict = verdicts.verdict_of(dataclasses.replace(mutated, sample=sample), Path("x"))
    assert (verdict.outcome, verdict.reason[: len(reason)]) == (outcome, reason)
