"""Compare each stage's student with the teacher after training: results.json, grid.png and report.html."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypersd_jax.config import Config
from hypersd_jax.evaluation import Report, Row, Sample, image_grid, read_metrics, read_strip, training_seconds
from hypersd_jax.evaluation.columns import column_notes
from hypersd_jax.evaluation.comparison import (
    SEEDS,
    Outcome,
    Student,
    compare,
    dataset_evaluator,
    dataset_teacher,
    embedded_evaluator,
    embedded_teacher,
)
from hypersd_jax.evaluation.comparison_report import margin_lines, own_notes, quality_series
from hypersd_jax.evaluation.files import write_results
from hypersd_jax.evaluation.provenance import device_line, duration, made_line, python_command
from hypersd_jax.evaluation.tables import steps_text
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.training.output import Output

# The settings of a stage that the page shows, where the stage has them.
SHOWN_SETTINGS = ("k", "solver_steps", "times", "student", "updates", "batch_size", "learning_rate", "teacher", "ema")
# How many previews of a stage the page shows before the last; all of them are in samples/.
SHOWN_PREVIEWS = 4


def compare_run(
    config: Config,
    output: Output,
    pipe: Pipeline,
    base: str,
    *,
    prompts: Sequence[str] = (),
    command: str | None = None,
) -> list[Row]:
    """Measure every student of a run; write results.json, grid.png and report.html, and return the rows.

    Args:
        config: the run's.
        output: its folder, with one student a stage.
        pipe: the base, without LoRAs.
        base: fingerprint of the base's UNet.
        prompts: the first captions of a dataset of one's own, which it is compared on.
        command: what started the run; None: a Python program.
    """
    stages, settings, count = config.adapter_stages, config.evaluation, config.compared_samples
    students = [
        Student(
            name=stage.name,
            path=output.student(stage),
            is_model=stage.exports_model,
            samplings=[dict(sampling) for sampling in stage.samplings],
        )
        for stage in stages
    ]
    guidance = float(pipe.settings(sampler="ddim", guidance=settings.guidance).guidance or 0.0)
    if config.on_emoji:
        evaluator = embedded_evaluator(pipe, count, config.data.groups)
        teacher = embedded_teacher(pipe, base, guidance, settings.batch_size)
    else:
        evaluator = dataset_evaluator(pipe, prompts, count)
        samplings = [sampling for student in students for sampling in student.samplings]
        teacher = dataset_teacher(pipe, base, guidance, settings.batch_size, samplings)
    outcome = compare(teacher, students, evaluator, output.root)
    if jax.process_index() == 0:
        write_results(output.root, run_report(config, output, outcome, command))
    return list(outcome.rows)


def run_report(config: Config, output: Output, outcome: Outcome, command: str | None) -> Report:
    """Make the report of a run: its results, how it was trained, and its previews."""
    log = output.root / "metrics.jsonl"  # a run whose stages are all reused from another has none
    metrics = read_metrics(log) if log.exists() else []
    shown = "Held-out concepts" if config.on_emoji else "Captions of the dataset"
    if outcome.ranked:
        shown += ", from the one that the teacher's image fits best to the hardest"
    grids = {f"{shown}; the same latents along each row": image_grid(outcome.columns, outcome.prompts)}
    if outcome.seeds_columns:
        numbers = [f"seed {number}" for number in range(SEEDS)]
        grids[f"{outcome.seeds_prompt}: eight seeds"] = image_grid(outcome.seeds_columns, numbers)
    notes = column_notes([key for row in outcome.rows for key in row])
    return Report(
        title="Few-step students",
        made=made_line(),
        summary=margin_lines(outcome.rows),
        details=_details(config, outcome, training_seconds(metrics)),
        command=command or python_command(output.root / "config.yaml"),
        rows=outcome.rows,
        notes=notes if config.on_emoji else [*own_notes(outcome.rows), *notes],
        quality=quality_series(outcome.rows),
        metrics=metrics,
        feedback={stage.name: stage.guarded for stage in config.adapter_stages},
        grids=grids,
        prompts=outcome.prompts,
        strips=_strips(output.samples, [stage.name for stage in config.adapter_stages]),
    )


def _details(config: Config, outcome: Outcome, trained: Mapping[str, float]) -> dict[str, Any]:
    first = outcome.rows[0]
    details = {
        "base": config.model.source,
        "data": config.data.source,
        "adapter": f"LoRA, rank {config.lora.rank}",
        "teacher": f"{steps_text(first['steps'])} of {first['sampler']}, guidance {first['guidance']:g}",
        "device": f"{device_line()}, {os.cpu_count()} CPU cores",
        "jax": jax.__version__,
        "seed": config.seed,
        "seeds of the samples": f"{min(outcome.seeds)} to {max(outcome.seeds)}",
        "training": f"{duration(sum(trained.values()))}, the updates of all stages of this run",
        "comparison": duration(outcome.seconds),
    }
    for index, stage in enumerate(config.adapter_stages):
        settings = dataclasses.asdict(stage)
        keys = [key for key in SHOWN_SETTINGS if key in settings]
        if settings.get("teacher") != "previous" or index == 0:
            keys.append("guidance")
        spent = f"trained in {duration(trained[stage.name])}" if stage.name in trained else "not trained in this run"
        if stage.name not in trained and config.reuse is not None:
            spent = f"reused from {config.reuse}"
        details[stage.name] = f"{', '.join(f'{key} {settings[key]}' for key in keys)}; {spent}"
    return details


def _strips(folder: Path, stages: Sequence[str]) -> dict[str, list[Sample]]:
    """Read the previews of each stage: some from its training, by the steps in their names, and the last."""
    found: dict[str, list[Sample]] = {}
    names = {path.stem: path for path in folder.glob("*.png")}
    for stage in sorted(stages, key=natural):
        previews = sorted((name for name in names if re.fullmatch(re.escape(stage) + r"-\d{6,}", name)), key=natural)
        previews = [name for name in previews if name not in stages]
        chosen = np.unique(np.linspace(0, len(previews) - 1, SHOWN_PREVIEWS).astype(int)) if previews else ()
        few = [previews[index] for index in chosen]
        for name in (*few, *([stage] if stage in names else [])):
            found[f"Training captions: {name}"] = read_strip(names[name])
    return found


def natural(text: str) -> list[tuple[int, str]]:
    """Split a name into a sort key that puts tscd-2 before tscd-16."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
