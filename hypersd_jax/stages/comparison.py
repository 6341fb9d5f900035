"""After training: each student against the teacher, in numbers, pictures and one page."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from hypersd_jax.config import Config, Sampling, StageConfig
from hypersd_jax.evaluation import paired_margin
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.appraisal import look
from hypersd_jax.stages.baseline import Baseline, get_baseline
from hypersd_jax.stages.comparison_report import OTHER_LATENTS, TEACHER, Outcome, steps_text, write_comparison
from hypersd_jax.stages.evaluate_rows import Row
from hypersd_jax.stages.export import student_path
from hypersd_jax.stages.output import Output
from hypersd_jax.stages.reference import MANY_STEPS, Measured, Reference, calls_of, draw, further_features, measure


def compare(
    config: Config,
    output: Output,
    pipe: Pipeline,
    base: str,
    *,
    prompts: Sequence[str] = (),
    command: str | None = None,
) -> list[Row]:
    """Measure every student; write results.json, grid.png and report.html, and return the rows.

    Args:
        config: the run's.
        output: its folder, with one LoRA file a stage.
        pipe: the base, without LoRAs.
        base: fingerprint of the base's UNet.
        prompts: the first captions of a dataset of one's own, which it is compared on.
        command: what started the run; None: a Python program.
    """
    begin = time.perf_counter()
    size = config.evaluation.batch_size
    baseline = get_baseline(config, pipe, base, output.root, prompts)
    items, shown = baseline.items, baseline.shown
    columns: dict[str, np.ndarray] = {f"teacher {MANY_STEPS} steps": baseline.reference.pictures.images[:shown]}
    rows = _teacher_rows(baseline)
    few = items[: max(shown, min(size, len(items)))]
    samplings = [(stage, sampling) for stage in config.adapter_stages for sampling in stage.samplings]
    for stage, sampling in tqdm(samplings, desc="comparing", unit="student", disable=jax.process_index() != 0):
        steps = steps_text(sampling["steps"])
        if f"teacher {steps}" not in columns:
            options: dict[str, Any] = {"guidance": baseline.guidance, "sampler": "ddim", "batch_size": size}
            columns[f"teacher {steps}"] = draw(pipe, few, steps=sampling["steps"], **options)[0][:shown]
        with _with_student(pipe, output, stage) as student:
            row, images = _student(student, stage.name, sampling, baseline, size)
        label = f"student {steps}"
        columns[f"{stage.name}, {steps}" if label in columns else label] = images[:shown]
        rows.append(row)
    outcome = Outcome(
        rows=rows,
        columns=columns,
        prompts=[item.prompt for item in items[:shown]],
        seeds=len(items),
        command=command,
        seconds=time.perf_counter() - begin,
    )
    write_comparison(config, output, outcome)
    return rows


@contextlib.contextmanager
def _with_student(pipe: Pipeline, output: Output, stage: StageConfig) -> Iterator[Pipeline]:
    """The base under the stage's LoRA, as long as this lasts, or the model that the stage has written."""
    path = student_path(output, stage)
    if stage.exports_model:
        yield Pipeline.from_pretrained(path, dtype=pipe.dtype, mesh=pipe.mesh)
        return
    pipe.load_lora(path, name=stage.name)
    try:
        yield pipe
    finally:
        pipe.unload_lora(stage.name)


def _student(
    pipe: Pipeline, name: str, sampling: Sampling, baseline: Baseline, batch_size: int
) -> tuple[Row, np.ndarray]:
    """The row and the pictures (N, H, W, 3) of the student that is loaded."""
    items, appraiser = baseline.items, baseline.appraiser
    draw(pipe, items[:batch_size], batch_size=batch_size, **sampling)  # compiles
    images, seconds = draw(pipe, items, batch_size=batch_size, **sampling)
    mine = look(images)
    further = None if appraiser.own else further_features(pipe, items, batch_size=batch_size, **sampling)
    found = measure(
        mine,
        baseline.reference.pictures,
        steps=sampling["steps"],
        guidance=sampling["guidance"],
        values=appraiser.values(mine, further),
        sets=appraiser.measures_sets,
        units=appraiser.units,
    )
    row = {**_row(name, sampling["sampler"], found), "seconds_per_image": seconds}
    return row | _margin(found, baseline.reference), images


def _teacher_rows(baseline: Baseline) -> list[Row]:
    reference, seconds = baseline.reference, baseline.seconds
    first = {
        "model": TEACHER,
        "sampler": "ddim",
        "steps": MANY_STEPS,
        "guidance": baseline.guidance,
        "calls": calls_of(MANY_STEPS, baseline.guidance),
        "distance": 0.0,
        "distance_se": 0.0,
        **({"fid_teacher": 0.0} if baseline.appraiser.measures_sets else {}),
        **reference.values,
    }
    rows = [first] if reference.floor is None else [first, _row(OTHER_LATENTS, "ddim", reference.floor)]
    rows += [_row(TEACHER, "ddim", teacher) for teacher in reference.teachers]
    for row in rows:
        timed = seconds.get((row["steps"], row["guidance"]))
        if timed is not None:
            row["seconds_per_image"] = timed
    return rows


def _margin(found: Measured, reference: Reference) -> Row:
    """A student's margin over the nearest teacher at as many network calls, where there is one."""
    rivals = [teacher for teacher in reference.teachers if teacher.calls == found.calls]
    if not rivals:
        return {}
    nearest = min(rivals, key=lambda rival: rival.distance.mean)
    margin = paired_margin(found.distances, nearest.distances, found.units)
    row = {
        "margin": margin.mean,
        "margin_se": margin.standard_error,
        "rival": f"{steps_text(nearest.steps)}, guidance {nearest.guidance:g}",
    }
    kids = [rival.kid.mean for rival in rivals if rival.kid is not None]
    return row if found.kid is None else {**row, "kid_margin": min(kids) - found.kid.mean}


def _row(model: str, sampler: str, found: Measured) -> Row:
    sets: Row = {}
    if found.kid is not None:
        sets = {"fid_teacher": found.fid, "kid": found.kid.mean, "kid_se": found.kid.standard_error}
    return {
        "model": model,
        "sampler": sampler,
        "steps": found.steps,
        "guidance": found.guidance,
        "calls": found.calls,
        **sets,
        "distance": found.distance.mean,
        "distance_se": found.distance.standard_error,
        **found.values,
    }
