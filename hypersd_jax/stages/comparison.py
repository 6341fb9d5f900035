"""After training: each student against the teacher, in numbers, pictures and one page."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from hypersd_jax.config import AdapterStage, Config
from hypersd_jax.data import EvalItem, evaluation_list
from hypersd_jax.evaluation import Report, paired_margin, picture_grid, read_metrics, write_report
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.appraisal import Appraiser, look, make_appraiser
from hypersd_jax.stages.evaluate_rows import Row
from hypersd_jax.stages.export import is_whole, student_path
from hypersd_jax.stages.output import Output
from hypersd_jax.stages.reference import (
    MANY_STEPS,
    Measured,
    Reference,
    draw,
    further_features,
    get_reference,
    measure,
)
from hypersd_jax.stages.result_files import write_picture, write_rows
from hypersd_jax.stages.student import Sampling, compared_samplings

GRID_ROWS = 12
# What the page says of a stage, where the stage has it.
TOLD = ("k", "solver_steps", "times", "student", "updates", "batch_size", "learning_rate", "teacher", "ema")
NOTES = (
    "Distance: root mean squared pixel difference (0..1) to the teacher's 25-step picture of the same prompt from the "
    "same latents. KID and FID: EfficientNet-Lite0 features, against the teacher's 25-step pictures; comparable with "
    "no Inception figure. The row from other latents is their floor at this number of pictures.",
    "Calls: UNet calls a picture; guidance doubles them. Margin: how much nearer a student is than the teacher at as "
    "many calls, in distance, mean over prompts of the paired difference, with its standard error; the nearest such "
    "teacher counts, with or without guidance.",
    "Text match: 100 times the cosine between picture and prompt, by a scorer trained on the embedded pictures. "
    "Shuffled: the same pictures with one another's prompts. Gain: the difference, zero for a picture that says "
    "nothing of its prompt. FID and KID to training pictures: against as many real ones.",
    "Diversity: mean distance in features between the pictures of one prompt from 4 seeds, over the first 32 prompts; "
    "zero where every seed draws one picture. What is to be kept is that of the teacher at 25 steps, whose two rows "
    "share it.",
)


def compare(config: Config, output: Output, pipe: Pipeline, base: str) -> list[Row]:
    """Measure every student; write results.json, grid.png and report.html, and return the rows.

    Args:
        config: the run's.
        output: its folder, with one LoRA file a stage.
        pipe: the base, without LoRAs.
        base: fingerprint of the base's UNet.
    """
    settings = config.evaluation
    groups, size = config.data.groups, settings.batch_size
    items = evaluation_list(config.compared_samples, groups=groups)
    reference = get_reference(
        pipe, items, groups=groups, guidance=settings.guidance, batch_size=size, base=base, folder=output.root
    )
    shown = min(GRID_ROWS, len(items))
    columns: dict[str, np.ndarray] = {f"teacher {MANY_STEPS} steps": reference.pictures.images[:shown]}
    rows = _teacher_rows(reference, _teacher_seconds(pipe, items[:size], reference))
    appraiser = make_appraiser(items, groups, pipe.native_size[0])
    few = items[: max(shown, min(size, len(items)))]
    for stage in tqdm(config.adapter_stages, desc="comparing", unit="student"):
        for sampling in compared_samplings(stage):
            steps = _steps(sampling["steps"])
            if f"teacher {steps}" not in columns:
                options: dict[str, Any] = {"guidance": settings.guidance, "sampler": "ddim", "batch_size": size}
                columns[f"teacher {steps}"] = draw(pipe, few, steps=sampling["steps"], **options)[0][:shown]
            with _with_student(pipe, output, stage) as student:
                row, images = _student(student, stage.name, sampling, items, reference, appraiser, size)
            label = f"student {steps}"
            columns[f"{stage.name}, {steps}" if label in columns else label] = images[:shown]
            rows.append(row)
    _write_all(config, output, rows, columns, [item.prompt for item in items[:shown]])
    return rows


@contextlib.contextmanager
def _with_student(pipe: Pipeline, output: Output, stage: AdapterStage) -> Iterator[Pipeline]:
    """The base under the stage's LoRA, as long as this lasts, or the model that the stage has written."""
    path = student_path(output, stage)
    if is_whole(stage):
        yield Pipeline.from_pretrained(path, dtype=pipe.dtype, mesh=pipe.mesh)
        return
    pipe.load_lora(path, name=stage.name)
    try:
        yield pipe
    finally:
        pipe.unload_lora(stage.name)


def _student(
    pipe: Pipeline,
    name: str,
    sampling: Sampling,
    items: Sequence[EvalItem],
    reference: Reference,
    appraiser: Appraiser,
    batch_size: int,
) -> tuple[Row, np.ndarray]:
    """The row and the pictures (N, H, W, 3) of the student that is loaded."""
    draw(pipe, items[:batch_size], batch_size=batch_size, **sampling)  # compiles
    images, seconds = draw(pipe, items, batch_size=batch_size, **sampling)
    mine = look(images)
    values = appraiser.values(mine, further_features(pipe, items, batch_size=batch_size, **sampling))
    found = measure(mine, reference.pictures, steps=sampling["steps"], guidance=sampling["guidance"], values=values)
    row = {**_row(name, sampling["sampler"], found), "seconds_per_image": seconds}
    return row | _margin(found, reference), images


def _teacher_seconds(pipe: Pipeline, items: Sequence[Any], reference: Reference) -> dict[tuple[int, float], float]:
    """(steps, guidance) -> seconds a picture takes the teacher, in one full batch, after a first one that compiles."""
    seconds = {}
    for row in tqdm((reference.floor, *reference.teachers), desc="timing the teacher", unit="model"):
        options: dict[str, Any] = {"guidance": row.guidance, "sampler": "ddim", "batch_size": len(items)}
        draw(pipe, items, steps=row.steps, **options)
        _, seconds[row.steps, row.guidance] = draw(pipe, items, steps=row.steps, **options)
    return seconds


def _teacher_rows(reference: Reference, seconds: Mapping[tuple[int, float], float]) -> list[Row]:
    floor = reference.floor
    first = {
        "model": "teacher",
        "sampler": "ddim",
        "steps": floor.steps,
        "guidance": floor.guidance,
        "calls": floor.calls,
        "distance": 0.0,
        "distance_se": 0.0,
        "fid_teacher": 0.0,
        **reference.values,
    }
    rows = [first, _row("teacher, other latents", "ddim", floor)]
    rows += [_row("teacher", "ddim", teacher) for teacher in reference.teachers]
    return [{**row, "seconds_per_image": seconds[row["steps"], row["guidance"]]} for row in rows]


def _margin(found: Measured, reference: Reference) -> Row:
    """A student's margin over the nearest teacher at as many network calls, where there is one."""
    rivals = [teacher for teacher in reference.teachers if teacher.calls == found.calls]
    if not rivals:
        return {}
    nearest = min(rivals, key=lambda rival: rival.distance.mean)
    margin = paired_margin(found.distances, nearest.distances)
    return {
        "margin": margin.mean,
        "margin_se": margin.standard_error,
        "rival": f"{_steps(nearest.steps)}, guidance {nearest.guidance:g}",
        "kid_margin": min(rival.kid.mean for rival in rivals) - found.kid.mean,
    }


def _row(model: str, sampler: str, found: Measured) -> Row:
    return {
        "model": model,
        "sampler": sampler,
        "steps": found.steps,
        "guidance": found.guidance,
        "calls": found.calls,
        "fid_teacher": found.fid,
        "kid": found.kid.mean,
        "kid_se": found.kid.standard_error,
        "distance": found.distance.mean,
        "distance_se": found.distance.standard_error,
        **found.values,
    }


def _write_all(
    config: Config, output: Output, rows: list[Row], columns: Mapping[str, np.ndarray], prompts: Sequence[str]
) -> None:
    if jax.process_index() != 0:
        return
    write_rows(output.root / "results.json", rows)
    grid = picture_grid(columns, prompts)
    write_picture(output.root / "grid.png", grid)
    log = output.root / "metrics.jsonl"  # a run whose stages are all taken over from another has none
    report = Report(
        title="Few-step students",
        summary=_summary(rows),
        facts=_facts(config),
        rows=rows,
        notes=NOTES,
        metrics=read_metrics(log) if log.exists() else [],
        grids={
            "Held-out concepts, the same latents along each row": grid,
            **{f"Training captions: {path.stem}": Image.open(path) for path in sorted(output.samples.glob("*.png"))},
        },
    )
    write_report(report, output.root / "report.html")


def _summary(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "margin" in row:
            side = "nearer to" if row["margin"] >= 0 else "farther from"
            lines.append(
                f"{row['model']}: {_steps(row['steps'])}, {abs(row['margin']):.4f} ± {row['margin_se']:.4f} {side} the "
                f"teacher's {MANY_STEPS}-step pictures than the teacher itself at as many network calls "
                f"({row['rival']})."
            )
    return lines


def _facts(config: Config) -> dict[str, Any]:
    facts = {
        "base": config.model.source,
        "data": config.data.source,
        "adapter": f"LoRA, rank {config.lora.rank}",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "jax": jax.__version__,
    }
    for index, stage in enumerate(config.adapter_stages):
        settings = dataclasses.asdict(stage)
        keys = [key for key in TOLD if key in settings]
        if settings.get("teacher") != "previous" or index == 0:
            keys.append("guidance")
        facts[stage.name] = ", ".join(f"{key} {settings[key]}" for key in keys)
    return facts


def _steps(count: int) -> str:
    return f"{count} step" + ("" if count == 1 else "s")
