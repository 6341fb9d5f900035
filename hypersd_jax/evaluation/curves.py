"""Training curves: what metrics.jsonl holds, one panel a stage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.svg import COLOURS, plot

MOST_POINTS = 400
# A curve that spans more than this factor is drawn on a logarithmic axis.
LOGARITHMIC = 20.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl.

    Raises:
        UserError: naming file and line that is not a JSON object.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is not a line of metrics: {line[:60]!r}")
        records.append(record)
    return records


def training_seconds(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds that the updates of each stage took, in the stages' order.

    A line's ``seconds`` are the mean over the updates since the line before. A run that was stopped and resumed has
    each update once in the file, so that an update which had to be done again counts once.
    """
    totals: dict[str, float] = {}
    last: dict[str, int] = {}
    for record in records:
        stage, step, seconds = str(record.get("stage", "")), int(record.get("step", 0)), record.get("seconds")
        totals.setdefault(stage, 0.0)
        if isinstance(seconds, int | float) and math.isfinite(seconds):
            totals[stage] += seconds * (step - last.get(stage, 0))
        last[stage] = step
    return totals


def stage_curves(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, str]:
    """``key`` over the updates of each stage that has it, as ``{stage: <svg> element}``; each has axes of its own.

    Every value is drawn pale and their running mean strong. Values that were not finite are left out.
    """
    stages: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        points = stages.setdefault(str(record.get("stage", "")), [])
        value = record.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((int(record["step"]), float(value)))
    return {
        name: _curve(points, f"{key} over the updates of {name}", COLOURS[number % len(COLOURS)])
        for number, (name, points) in enumerate(stages.items())
        if points
    }


def _curve(points: Sequence[tuple[int, float]], label: str, colour: str) -> str:
    steps, values = np.array([step for step, _ in points]), np.array([value for _, value in points])
    stride = -(-len(points) // MOST_POINTS)
    with plot(label, x="update") as drawn:
        axes = drawn.axes
        _scale(axes, values)
        marker = "o" if len(points) == 1 else ""  # a line needs two
        axes.plot(steps[::stride], values[::stride], color=colour, alpha=0.3, linewidth=0.8)
        smooth = _running_mean(values, max(1, len(values) // 25))
        axes.plot(steps[::stride], smooth[::stride], color=colour, linewidth=1.8, marker=marker)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return drawn.svg


def _scale(axes: Axes, values: np.ndarray) -> None:
    if values.min() > 0 and values.max() > LOGARITHMIC * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last ``window`` values, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
