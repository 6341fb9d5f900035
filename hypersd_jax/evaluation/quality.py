"""Quality against cost: a metric of the table over sampling steps, and over UNet calls, with its standard errors."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from matplotlib.ticker import NullFormatter, NullLocator

from hypersd_jax.evaluation.columns import COLUMNS, Column
from hypersd_jax.evaluation.svg import COLOURS, INK, plot

MARKERS = "osD^vPX*"
# A level that is this much higher than all points would leave them a line at the bottom, and is only named.
STRETCH = 3.0
AXES = (("steps", "sampling steps"), ("calls", "UNet calls an image"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Rows of the table that belong together, and are joined by a line."""

    name: str
    rows: tuple[Mapping[str, Any], ...]

    def points(self, x: str, y: str) -> list[tuple[float, float, float]]:
        """(x, y, standard error of y, or 0 where there is none) of the rows that have both, by x."""
        found = []
        for row in self.rows:
            cost, value, error = row.get(x), row.get(y), row.get(f"{y}_se")
            if _known(cost) and _known(value):
                found.append((float(cost), float(value), float(error) if _known(error) else 0.0))
        return sorted(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """A row that is no model at a number of steps, but a level that the others are read against."""

    name: str
    row: Mapping[str, Any]


def quality_section(series: Sequence[Series], floor: Floor | None = None) -> str:
    """The plots as HTML, for each metric that two points have, under one legend; nothing where none has."""
    charts = []
    for column in _plotted():
        key, title = column.key, column.plot
        values = [value for each in series for _, value, _ in each.points("steps", key)]
        if len(values) < 2:
            continue
        found = None if floor is None else floor.row.get(key)
        level = float(found) if _known(found) else None
        inside = level is not None and level <= STRETCH * max(values)
        shown = "" if floor is None or level is None else f"; {'dashed: ' if inside else ''}{floor.name}, {level:.3g}"
        for x, axis in AXES:
            label = f"{title} against {axis}"
            svg = _plot(series, level if inside else None, x, key, label=label, axis=axis)
            text = html.escape(f"{label}; {column.better} is better{shown}")
            charts.append(f"<figure>\n<figcaption>{text}</figcaption>\n{svg}\n</figure>\n")
    return f'{_legend(series)}<div class="charts">\n{"".join(charts)}</div>\n' if charts else ""


def _plotted() -> list[Column]:
    return [column for column in COLUMNS.values() if column.plot]


def _plot(series: Sequence[Series], level: float | None, x: str, y: str, *, label: str, axis: str) -> str:
    costs: set[float] = set()
    with plot(label, x=axis) as drawn:
        axes = drawn.axes
        for number, each in enumerate(series):
            points = each.points(x, y)
            if not points:
                continue
            at, values, errors = zip(*points, strict=True)
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            axes.errorbar(at, values, yerr=errors, capsize=2.5, linewidth=1.4, markersize=4.5, **style)
            costs |= set(at)
        if level is not None:
            axes.axhline(level, color=INK, alpha=0.45, linestyle="--", linewidth=1.0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted(costs), [f"{cost:g}" for cost in sorted(costs)])
    return drawn.svg


def _legend(series: Sequence[Series]) -> str:
    """A mark and a name for each, in the page's own letters."""
    items = "".join(
        f'<li><i style="background:{COLOURS[number % len(COLOURS)]}"></i><bdi>{html.escape(each.name)}</bdi></li>\n'
        for number, each in enumerate(series)
        if any(each.points("steps", column.key) for column in _plotted())
    )
    return f'<ul class="legend">\n{items}</ul>\n'


def _known(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
