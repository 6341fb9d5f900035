"""Training curves as inline SVG that takes the colours of the page around it."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from hypersd_jax.errors import UserError

# Drawn as ink, and handed to the page's own text colour afterwards.
INK = "#010203"
STAGE_COLOURS = ("#4c84c4", "#e8853a", "#4fa35a", "#d65a5f", "#9a72c8", "#3fa8a8", "#c08a3e", "#d873a8")
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


def curve(records: Sequence[Mapping[str, Any]], key: str) -> str | None:
    """``key`` over the updates of all stages, one colour a stage, as an ``<svg>`` element; None where no record has it.

    Every value is drawn pale and their running mean strong. Values that were not finite are left out.
    """
    stages: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        points = stages.setdefault(str(record.get("stage", "")), [])
        value = record.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((int(record["step"]), float(value)))
    stages = {name: points for name, points in stages.items() if points}
    if not stages:
        return None
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9}):
        figure = Figure(figsize=(6.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, stages)
        _dress(axes)
        if len(stages) > 1:
            figure.legend(frameon=False, labelcolor=INK, ncols=5, loc="outside upper right", handlelength=1.2)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inline(written.getvalue(), label=f"{key} over the updates")


def _draw(axes: Axes, stages: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    before = 0
    everything = [value for points in stages.values() for _, value in points]
    if min(everything) > 0 and max(everything) > LOGARITHMIC * min(everything):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    for number, (name, points) in enumerate(stages.items()):
        steps, values = np.array([p[0] for p in points]), np.array([p[1] for p in points])
        colour = STAGE_COLOURS[number % len(STAGE_COLOURS)]
        stride = -(-len(points) // MOST_POINTS)
        axes.plot(before + steps[::stride], values[::stride], color=colour, alpha=0.3, linewidth=0.8)
        smooth = _running_mean(values, max(1, len(values) // 25))
        axes.plot(before + steps[::stride], smooth[::stride], color=colour, linewidth=1.8, label=name)
        before += int(steps.max())


def _dress(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
        axes.spines[side].set_alpha(0.4)
    axes.tick_params(which="both", colors=INK)
    axes.grid(color=INK, alpha=0.1, linewidth=0.8)
    axes.set_xlabel("update", color=INK)
    axes.margins(x=0.01)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last ``window`` values, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _inline(svg: str, label: str) -> str:
    """The bare element: no prologue, no metadata, no name spaces, which HTML does not need."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    opening = f'<svg role="img" aria-label="{label}" stroke-linejoin="round" viewBox='
    svg = re.sub(r"<svg [^>]*?viewBox=", opening, svg, count=1)
    return svg.replace(INK, "currentColor").strip()
