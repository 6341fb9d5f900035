"""Quality against the cost of training: ``python benchmarks/embedded/cost.py RUN OUTPUT STAGE:STEP=FOLDER ...``.

RUN is the output folder of a run, each FOLDER what `measure.py` wrote of a checkpoint of it. OUTPUT gets cost.json,
cost.md and a plot a metric.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypersd_jax.evaluation import read_metrics, training_seconds, write_markdown
from hypersd_jax.evaluation.svg import COLOURS, as_file, plot

PLOTTED = ("clip_gain", "kid_train", "patch_kid_train", "precision", "recall", "diversity", "background_error")


def training_hours(records: Sequence[Mapping[str, Any]], stage: str, step: int) -> float:
    """Compute the hours that a run had trained for when a stage was at a step; ValueError where it never was."""
    for index, record in enumerate(records):
        if (record["stage"], record["step"]) == (stage, step):
            return sum(training_seconds(records[: index + 1]).values()) / 3600.0
    raise ValueError(f"the run has no line of step {step} of {stage}")


def cost_rows(records: Sequence[Mapping[str, Any]], points: Mapping[tuple[str, int], Path]) -> list[dict[str, Any]]:
    """List the measured checkpoints: their stage, step and hours, and the last row of their results.json."""
    rows = []
    for (stage, step), folder in points.items():
        measured = json.loads((folder / "results.json").read_text(encoding="utf-8"))[-1]
        figures = {key: value for key, value in measured.items() if key.removesuffix("_se") in PLOTTED}
        cost = {"stage": stage, "step": step, "hours": training_hours(records, stage, step), "n": measured["n"]}
        rows.append({**cost, **figures, "protocol": measured["protocol"]})
    return sorted(rows, key=lambda row: float(row["hours"]))


def cost_plot(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """Plot a metric with its standard errors over the hours, as the text of an SVG file."""
    with plot(f"{key} over hours of training", x="hours of training", y=key.replace("_", " ")) as drawn:
        errors = [row.get(f"{key}_se", 0.0) for row in rows]
        hours, values = [row["hours"] for row in rows], [row[key] for row in rows]
        drawn.axes.errorbar(hours, values, yerr=errors, color=COLOURS[0], marker="o", capsize=2.5, linewidth=1.4)
    return as_file(drawn.svg)


def main() -> None:
    """Read and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("points", nargs="+", metavar="STAGE:STEP=FOLDER")
    options = parser.parse_args()
    points = {}
    for text in options.points:
        at, _, folder = text.partition("=")
        stage, _, step = at.rpartition(":")
        points[stage, int(step)] = Path(folder)
    rows = cost_rows(read_metrics(options.run / "metrics.jsonl"), points)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "cost.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    write_markdown(options.output / "cost.md", "Quality against the cost of training", rows, [])
    for key in PLOTTED:
        if all(key in row for row in rows):
            (options.output / f"{key}.svg").write_text(cost_plot(rows, key), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
