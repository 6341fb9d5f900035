"""benchmarks/embedded/cost.py: the hours of a checkpoint, the rows in their order, and a plot that stands alone."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.embedded.cost import cost_plot, cost_rows, training_hours

RECORDS = [
    {"stage": "teacher", "step": 10, "seconds": 36.0},
    {"stage": "teacher", "step": 20, "seconds": 72.0},
    {"stage": "annealed", "step": 10, "seconds": 360.0},
]


def test_hours_are_those_up_to_the_step() -> None:
    assert training_hours(RECORDS, "teacher", 10) == pytest.approx(0.1)
    assert training_hours(RECORDS, "teacher", 20) == pytest.approx(0.3)
    assert training_hours(RECORDS, "annealed", 10) == pytest.approx(1.3)
    with pytest.raises(ValueError, match="no line of step 15 of teacher"):
        training_hours(RECORDS, "teacher", 15)


def test_rows_and_their_plot(tmp_path: Path) -> None:
    points = {}
    for stage, step, gain in (("annealed", 10, 60.0), ("teacher", 10, 50.0)):
        folder = tmp_path / f"{stage}-{step}"
        folder.mkdir()
        measured = {"model": "m", "n": 4, "clip_gain": gain, "clip_gain_se": 1.0, "clip": 70.0, "protocol": "p"}
        (folder / "results.json").write_text(json.dumps([{"model": "real"}, measured]))
        points[stage, step] = folder
    rows = cost_rows(RECORDS, points)
    assert [(row["stage"], row["clip_gain"], row["clip_gain_se"]) for row in rows] == [
        ("teacher", 50.0, 1.0),
        ("annealed", 60.0, 1.0),
    ]
    assert "clip" not in rows[0]
    assert ElementTree.fromstring(cost_plot(rows, "clip_gain")).tag == "{http://www.w3.org/2000/svg}svg"
