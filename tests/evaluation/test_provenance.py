"""What a report says of where it comes from."""

from __future__ import annotations

import sys

import pytest

from hypersd_jax.evaluation.provenance import duration, typed_command


@pytest.mark.parametrize(
    ("argv", "arguments", "typed"),
    [
        (["train.py"], ["train"], "python train.py"),
        (["train.py", "data=/my set #1"], ["train", "data=/my set #1"], "python train.py 'data=/my set #1'"),
        (["/venv/bin/hypersd", "train", "seed=1"], None, "/venv/bin/hypersd train seed=1"),
        (["/x/hypersd_jax/__main__.py", "train"], None, "python -m hypersd_jax train"),
        (["pytest", "-q"], ["train", "seed=1"], "hypersd train seed=1"),
        (["train.py", "--other"], ["train", "seed=1"], "hypersd train seed=1"),
    ],
)
def test_the_command_that_was_typed(
    argv: list[str], arguments: list[str] | None, typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert typed_command(arguments) == typed


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.04, 59.9, 60.4, 245, 7620)] == [
        "0.0 s", "59.9 s", "1 min 00 s", "4 min 05 s", "2 h 07 min",
    ]  # fmt: skip
