"""How a stage with feedback went: the reward, its judges, diversity and recall over its updates, in one plot."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hypersd_jax.evaluation.svg import COLOURS, INK, plot

GUARDED = ("fixed_reward", "judge", "diversity", "recall")
"""Keys of metrics.jsonl that are plotted; the second reward's and judge's end in ``_2``, and so on."""

Names = Mapping[str, str]
"""What a key of metrics.jsonl is called on the page."""


def feedback_section(records: Sequence[Mapping[str, Any]], names: Mapping[str, Names]) -> str:
    """Draw each stage that has measurements as HTML: a legend with first and last values, and the plot.

    Args:
        records: of metrics.jsonl.
        names: of each stage's keys; those without a name have the key's own.
    """
    stages: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for record in records:
        for key, value in record.items():
            if _is_guarded(key) and isinstance(value, int | float) and math.isfinite(value):
                curves = stages.setdefault(str(record.get("stage", "")), {})
                curves.setdefault(key, []).append((int(record["step"]), float(value)))
    return "".join(_stage(stage, curves, names.get(stage, {})) for stage, curves in stages.items())


def _is_guarded(key: str) -> bool:
    name, _, number = key.rpartition("_")
    return key in GUARDED or (name in GUARDED and number.isdecimal())


def _stage(stage: str, curves: Mapping[str, Sequence[tuple[int, float]]], names: Names) -> str:
    order = sorted(curves, key=lambda key: next(i for i, name in enumerate(GUARDED) if key.startswith(name)))
    label = f"Rewards and judges over the updates of {stage}, change since the start"
    items = []
    with plot(label, x="update") as drawn:
        axes = drawn.axes
        axes.axhline(0.0, color=INK, alpha=0.45, linewidth=1.0)
        for number, key in enumerate(order):
            steps, values = (np.asarray(each) for each in zip(*curves[key], strict=True))
            colour = COLOURS[number % len(COLOURS)]
            # Of the largest value and not of the first, which may be near zero.
            change = (values - values[0]) / (np.abs(values).max() or 1.0)
            axes.plot(steps, change, color=colour, marker="o", markersize=3.0, linewidth=1.6)
            text = html.escape(f"{names.get(key, key)}: {values[0]:.4g} to {values[-1]:.4g}")
            items.append(f'<li><i style="background:{colour}"></i><bdi>{text}</bdi></li>\n')
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    caption = html.escape(f"{stage}: change since its start, in per cent of each curve's largest value")
    figure = f"<figure>\n<figcaption>{caption}</figcaption>\n{drawn.svg}\n</figure>\n"
    return f'<ul class="legend">\n{"".join(items)}</ul>\n<div class="charts">\n{figure}</div>\n'
