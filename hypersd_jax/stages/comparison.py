"""After training: each student against the teacher, in numbers, pictures and one page."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from hypersd_jax.config import Config, ConsistencyStage
from hypersd_jax.data import evaluation_list
from hypersd_jax.evaluation import (
    Report,
    Scorer,
    features,
    load_scorer,
    paired_margin,
    picture_grid,
    read_metrics,
    seen_by,
    write_report,
)
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.evaluate_drawing import Drawn, Prompted
from hypersd_jax.stages.evaluate_rows import Yardsticks, picture_row
from hypersd_jax.stages.evaluate_sources import training_pictures
from hypersd_jax.stages.output import Output
from hypersd_jax.stages.reference import MANY_STEPS, Measured, Reference, draw, get_reference, measure
from hypersd_jax.stages.result_files import write_picture, write_rows

GRID_ROWS = 12
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
)
Row = dict[str, Any]


def compare(config: Config, output: Output, pipe: Pipeline, base: str) -> list[Row]:
    """Measure every student; write results.json, grid.png and report.html, and return the rows.

    Args:
        config: the run's.
        output: its folder, with one LoRA file a stage.
        pipe: the base, without LoRAs.
        base: fingerprint of the base's UNet.
    """
    settings = config.evaluation
    items = evaluation_list(config.compared_samples, groups=config.data.groups)
    reference = get_reference(
        pipe, items, guidance=settings.guidance, batch_size=settings.batch_size, base=base, folder=output.root
    )
    shown = min(GRID_ROWS, len(items))
    columns: dict[str, np.ndarray] = {f"teacher {MANY_STEPS} steps": reference.images[:shown]}
    size = settings.batch_size
    rows = _teacher_rows(reference, _teacher_seconds(pipe, items[:size], reference))
    against_real = _appraiser([Prompted(item.prompt, item.seed) for item in items], config.data.groups, pipe)
    rows[0] |= against_real(reference.images)
    few = items[: max(shown, min(size, len(items)))]
    with tqdm(total=len(config.adapter_stages), desc="comparing", unit="student") as bar:
        for stage in config.adapter_stages:
            teacher_options: dict[str, Any] = {
                "steps": stage.k,
                "guidance": settings.guidance,
                "sampler": "ddim",
                "batch_size": size,
            }
            columns[f"teacher {_steps(stage.k)}"] = draw(pipe, few, **teacher_options)[0][:shown]
            pipe.load_lora(output.loras / f"{stage.name}.safetensors", name=stage.name)
            options: dict[str, Any] = {"steps": stage.k, "guidance": 0.0, "sampler": stage.sampler, "eta": stage.eta}
            draw(pipe, items[:size], batch_size=size, **options)  # compiles
            images, seconds = draw(pipe, items, batch_size=size, **options)
            pipe.unload_lora(stage.name)
            label = f"student {_steps(stage.k)}"
            columns[stage.name if label in columns else label] = images[:shown]
            found = measure(images, reference.images, reference.features, stage.k, 0.0)
            rows.append({**_student_row(stage, found, reference, seconds), **against_real(images)})
            bar.update()
    _write_all(config, output, rows, columns, [item.prompt for item in items[:shown]])
    return rows


def _appraiser(items: Sequence[Prompted], groups: Sequence[str] | None, pipe: Pipeline) -> Callable[[np.ndarray], Row]:
    """What pictures of these prompts are measured by beside the teacher's: training pictures, and their own texts."""
    scorer: Scorer = load_scorer("report")
    real = features(training_pictures(len(items), groups, pipe.native_size[0])[0])
    yardsticks = Yardsticks(real=real, scorer=scorer)

    def appraise(images: np.ndarray) -> Row:
        seen = seen_by(scorer.spec, images)
        return picture_row(yardsticks, items, Drawn(images, features(images), seen, seconds=0.0, chunks=()))

    return appraise


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
        "n": len(reference.images),
        "distance": 0.0,
        "fid_teacher": 0.0,
    }
    rows = [first, {**_row("teacher, other latents", "ddim", floor)}]
    rows += [_row("teacher", "ddim", teacher) for teacher in reference.teachers]
    return [{**row, "seconds_per_image": seconds[row["steps"], row["guidance"]]} for row in rows]


def _student_row(stage: ConsistencyStage, found: Measured, reference: Reference, seconds: float) -> Row:
    """The student's row, with its margin over the nearest teacher at as many network calls."""
    row = {**_row(stage.name, stage.sampler, found), "seconds_per_image": seconds}
    rivals = [teacher for teacher in reference.teachers if teacher.calls == found.calls]
    if rivals:
        nearest = min(rivals, key=lambda rival: rival.distance.mean)
        margin = paired_margin(found.distances, nearest.distances)
        row |= {
            "margin": margin.mean,
            "margin_se": margin.standard_error,
            "rival": f"{_steps(nearest.steps)}, guidance {nearest.guidance:g}",
            "kid_margin": min(rival.kid.mean for rival in rivals) - found.kid.mean,
        }
    return row


def _row(model: str, sampler: str, found: Measured) -> Row:
    return {
        "model": model,
        "sampler": sampler,
        "steps": found.steps,
        "guidance": found.guidance,
        "calls": found.calls,
        "n": len(found.distances),
        "fid_teacher": found.fid,
        "kid": found.kid.mean,
        "kid_se": found.kid.standard_error,
        "distance": found.distance.mean,
        "distance_se": found.distance.standard_error,
    }


def _write_all(
    config: Config, output: Output, rows: list[Row], columns: Mapping[str, np.ndarray], prompts: Sequence[str]
) -> None:
    if jax.process_index() != 0:
        return
    write_rows(output.root / "results.json", rows)
    grid = picture_grid(columns, prompts)
    write_picture(output.root / "grid.png", grid)
    report = Report(
        title="Few-step students",
        summary=_summary(rows),
        facts=_facts(config),
        rows=rows,
        notes=NOTES,
        metrics=read_metrics(output.root / "metrics.jsonl"),
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
        keys = ["k", "solver_steps", "updates", "batch_size", "learning_rate", "teacher", "ema"]
        if stage.teacher == "base" or index == 0:
            keys.append("guidance")
        facts[stage.name] = ", ".join(f"{key} {settings[key]}" for key in keys)
    return facts


def _steps(count: int) -> str:
    return f"{count} step" + ("" if count == 1 else "s")
