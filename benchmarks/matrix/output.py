"""The output of a matrix: results.json, README.md, grid.png, and plot.png of a sweep; each appears whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.matrix.recipes import Matrix, Panel
from benchmarks.matrix.scoring import Scorer
from benchmarks.matrix.tables import Row, margins, markdown, sampler_title, summarise
from hypersd_jax.evaluation import image_grid


def write_results(
    folder: Path,
    title: str,
    details: Sequence[str],
    matrix: Matrix,
    results: Sequence[Mapping[str, Any]],
    scorer: Scorer,
) -> str:
    """Write everything that ``results`` say so far; returns the Markdown page."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = summarise(results)
    found = margins(rows, matrix.against)
    teachers = scorer.teachers()
    page = markdown(title, details, rows, found, teachers, scorer.many_steps)
    runs = [{key: value for key, value in result.items() if key != "images"} for result in results]
    content = {"details": list(details), "rows": rows, "margins": found, "teachers": teachers, "runs": runs}
    _replace(folder / "results.json", lambda path: _write(path, json.dumps(content, indent=1) + "\n"))
    _replace(folder / "README.md", lambda path: _write(path, page))
    grid = image_grid(_columns(matrix, results, scorer), scorer.prompts)
    _replace(folder / "grid.png", lambda path: grid.save(path, format="png"))
    if matrix.panels:
        figure = plot(matrix.panels, rows)
        if figure.axes:
            _replace(folder / "plot.png", lambda path: figure.savefig(path, format="png", dpi=150))
    return page


def _columns(matrix: Matrix, results: Sequence[Mapping[str, Any]], scorer: Scorer) -> dict[str, np.ndarray]:
    """The teacher's images, then those of the first seed, many steps before few."""
    columns = {scorer.teacher_title: scorer.teacher_images}
    first = [result for result in results if result["seed"] == results[0]["seed"]]
    for result in sorted(first, key=lambda result: -result["steps"]):
        if not matrix.grid_steps or result["steps"] in matrix.grid_steps:
            title = f"{result['method']} {result['steps']}"
            columns[title if title not in columns else f"{title}, {sampler_title(result)}"] = result["images"]
    return columns


def plot(panels: Sequence[Panel], rows: Sequence[Row]) -> Figure:
    """Distance over each axis of a sweep, one line for each number of steps; bars are the spread over seeds.

    An axis of which only one point has been measured is left out.
    """
    measured = {row["recipe"] for row in rows}
    panels = [panel for panel in panels if sum(point.recipe in measured for point in panel.points) > 1]
    across = min(3, len(panels)) or 1
    down = -(-len(panels) // across) or 1
    figure = Figure(figsize=(4.2 * across, 3.2 * down), layout="constrained")
    every = sorted({row["steps"] for row in rows}, reverse=True)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(down, across, number + 1)
        for colour, steps in enumerate(every):
            found = [
                (index, row)
                for index, point in enumerate(panel.points)
                for row in rows
                if row["recipe"] == point.recipe and row["steps"] == steps
            ]
            if found:
                axes.errorbar(
                    [index for index, _ in found],
                    [row["distance"] for _, row in found],
                    yerr=[row["distance_sd"] or 0.0 for _, row in found],
                    color=f"C{colour}",
                    marker="o",
                    markersize=4,
                    capsize=3,
                    label=f"{steps} step" + ("s" if steps > 1 else ""),
                )
        axes.set_xticks(range(len(panel.points)), [point.at for point in panel.points])
        axes.set_title(panel.title, fontsize=10)
        axes.grid(alpha=0.2)
        axes.margins(x=0.15)
        if number % across == 0:
            axes.set_ylabel("distance to the teacher")
        if number == 0 and axes.containers:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    write(temporary)
    temporary.replace(path)
