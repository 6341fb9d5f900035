"""The files of the comparison after training: results.json, grid.png and report.html."""

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
from hypersd_jax.evaluation import (
    Floor,
    Report,
    Sample,
    Series,
    picture_grid,
    read_metrics,
    read_strip,
    training_seconds,
    write_report,
)
from hypersd_jax.stages.appraisal import SETS_LEAST
from hypersd_jax.stages.evaluate_rows import Row
from hypersd_jax.stages.output import Output
from hypersd_jax.stages.provenance import device_line, duration, made_line, python_command
from hypersd_jax.stages.result_files import write_picture, write_rows

TEACHER, OTHER_LATENTS = "teacher", "teacher, other latents"
# What the page says of a stage, where the stage has it.
TOLD = ("k", "solver_steps", "times", "student", "updates", "batch_size", "learning_rate", "teacher", "ema")
# Strips of a stage's way that the page shows beside the last; all of them are in samples/.
ON_THE_WAY = 4
DISTANCE = (
    "Distance: root mean squared pixel difference (0..1) to the teacher's 25-step picture of the same prompt from the "
    "same latents."
)
CALLS = (
    "Calls: UNet calls a picture; guidance doubles them. Margin: how much nearer a student is than the teacher at as "
    "many calls, in distance, mean over prompts of the paired difference, with its standard error; the nearest such "
    "teacher counts, with or without guidance."
)
MATCH = (
    "Text match: 100 times the cosine between picture and prompt, by a scorer trained on the embedded pictures. "
    "Shuffled: the same pictures with one another's prompts. Gain: the difference, zero for a picture that says "
    "nothing of its prompt."
)
EMBEDDED_NOTES = (
    f"{DISTANCE} KID and FID: EfficientNet-Lite0 features, against the teacher's 25-step pictures; comparable with "
    "no Inception figure. The row from other latents is their floor at this number of pictures.",
    CALLS,
    f"{MATCH} FID and KID to training pictures: against as many real ones.",
    "Diversity: mean distance in features between the pictures of one prompt from 4 seeds, over the first 32 prompts; "
    "zero where every seed draws one picture. What is to be kept is that of the teacher at 25 steps, whose two rows "
    "share it.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a comparison found.

    Attributes:
        rows: of results.json.
        columns: title of a column of the grid -> its images (N, H, W, 3).
        prompts: those of the grid's rows.
        seeds: the number of samples, from seed 0 on.
        command: what started the run; None: a Python program.
        seconds: what the comparison took.
    """

    rows: Sequence[Row]
    columns: Mapping[str, np.ndarray]
    prompts: Sequence[str]
    seeds: int
    command: str | None
    seconds: float


def write_comparison(config: Config, output: Output, outcome: Outcome) -> None:
    """Write the three files; only the first process does."""
    if jax.process_index() != 0:
        return
    write_rows(output.root / "results.json", outcome.rows)
    grid = picture_grid(outcome.columns, outcome.prompts)
    write_picture(output.root / "grid.png", grid)
    log = output.root / "metrics.jsonl"  # a run whose stages are all taken over from another has none
    metrics = read_metrics(log) if log.exists() else []
    shown = "Held-out concepts" if config.on_emoji else "Captions of the dataset"
    report = Report(
        title="Few-step students",
        made=made_line(),
        summary=_summary(outcome.rows),
        facts=_facts(config, outcome, training_seconds(metrics)),
        command=outcome.command or python_command(output.root / "config.yaml"),
        rows=outcome.rows,
        notes=EMBEDDED_NOTES if config.on_emoji else _own_notes(outcome.rows),
        quality=quality_series(outcome.rows),
        metrics=metrics,
        grids={f"{shown}, the same latents along each row": grid},
        prompts=outcome.prompts,
        strips=_strips(output.samples, [stage.name for stage in config.adapter_stages]),
    )
    write_report(report, output.root / "report.html")


def quality_series(rows: Sequence[Row]) -> tuple[list[Series], Floor | None]:
    """The teacher's rows by guidance, and the students': stages of one row each on one line, others each on its own."""
    teachers: dict[float, list[Row]] = {}
    students: dict[str, list[Row]] = {}
    for row in rows:
        if row["model"] == TEACHER:
            teachers.setdefault(row["guidance"], []).append(row)
        elif row["model"] != OTHER_LATENTS:
            students.setdefault(row["model"], []).append(row)
    series = [
        Series(name=f"teacher, guidance {scale:g}" if scale > 1 else "teacher, no guidance", rows=tuple(found))
        for scale, found in teachers.items()
    ]
    single = {name: found[0] for name, found in students.items() if len(found) == 1}
    if single:
        series.append(Series(name=f"students: {', '.join(single)}", rows=tuple(single.values())))
    series += [Series(name=name, rows=tuple(found)) for name, found in students.items() if len(found) > 1]
    floors = [row for row in rows if row["model"] == OTHER_LATENTS]
    if not floors:
        return series, None
    name = f"{steps_text(floors[0]['steps'])} of the teacher from other latents"
    return series, Floor(name=name, row=floors[0])


def _summary(rows: Sequence[Row]) -> list[str]:
    lines = []
    many = rows[0]["steps"]
    for row in rows:
        if "margin" in row:
            side = "nearer to" if row["margin"] >= 0 else "farther from"
            lines.append(
                f"{row['model']}: {steps_text(row['steps'])}, {abs(row['margin']):.4f} ± {row['margin_se']:.4f} {side} "
                f"the teacher's {many}-step pictures than the teacher itself at as many network calls ({row['rival']})."
                + (" That is within twice its error." if abs(row["margin"]) < 2 * row["margin_se"] else "")
            )
    return lines


def _own_notes(rows: Sequence[Row]) -> list[str]:
    """What the table of a dataset of one's own says, and why it does not say more."""
    count, many = rows[0]["n"], rows[0]["steps"]
    notes = [
        DISTANCE.replace("25-step", f"{many}-step"),
        f"The comparison is on {count} samples of the dataset's first captions. They are captions that training saw, "
        "and few: what lies within twice a standard error may be chance. Samples of one caption are alike, so that "
        "the errors are those of a mean over captions.",
        CALLS,
    ]
    if any(row["model"] == OTHER_LATENTS for row in rows):
        notes.append("The row from other latents: how far the teacher's samples of one caption are from one another.")
    if "kid" in rows[-1]:
        notes.append(
            "KID and FID: EfficientNet-Lite0 features, against the teacher's samples; comparable with no Inception "
            "figure."
        )
    else:
        notes.append(
            f"FID and KID are left out: of {count} samples they would say nothing. evaluation.samples={SETS_LEAST} or "
            "more gives them."
        )
    if "clip" in rows[0]:
        notes.append(MATCH)
    else:
        notes.append(
            "Text match is left out: the scorer that ships knows the words of the embedded captions alone, and cannot "
            "tell apart those of this list. `hypersd evaluate --clip` measures with a real CLIP."
        )
    if "diversity" in rows[0]:
        notes.append(
            "Diversity: mean distance in EfficientNet-Lite0 features between the samples of one caption; zero where "
            "every seed gives one image. What is to be kept is the teacher's in the first row."
        )
    return notes


def _facts(config: Config, outcome: Outcome, trained: Mapping[str, float]) -> dict[str, Any]:
    first = outcome.rows[0]
    facts = {
        "base": config.model.source,
        "data": config.data.source,
        "adapter": f"LoRA, rank {config.lora.rank}",
        "teacher": f"{steps_text(first['steps'])} of {first['sampler']}, guidance {first['guidance']:g}",
        "device": f"{device_line()}, {os.cpu_count()} CPU cores",
        "jax": jax.__version__,
        "seed": config.seed,
        "seeds of the samples": f"0 to {outcome.seeds - 1}",
        "training": f"{duration(sum(trained.values()))}, the updates of all stages of this run",
        "comparison": duration(outcome.seconds),
    }
    for index, stage in enumerate(config.adapter_stages):
        settings = dataclasses.asdict(stage)
        keys = [key for key in TOLD if key in settings]
        if settings.get("teacher") != "previous" or index == 0:
            keys.append("guidance")
        spent = f"trained in {duration(trained[stage.name])}" if stage.name in trained else "not trained in this run"
        if stage.name not in trained and config.reuse is not None:
            spent = f"taken over from {config.reuse}"
        facts[stage.name] = f"{', '.join(f'{key} {settings[key]}' for key in keys)}; {spent}"
    return facts


def _strips(folder: Path, stages: Sequence[str]) -> dict[str, list[Sample]]:
    """The samples of each stage, by the numbers in their names: some from its way, and those after its last update."""
    found: dict[str, list[Sample]] = {}
    names = {path.stem: path for path in folder.glob("*.png")}
    for stage in sorted(stages, key=natural):
        way = sorted((name for name in names if re.fullmatch(re.escape(stage) + r"-\d{6,}", name)), key=natural)
        way = [name for name in way if name not in stages]
        few = [way[place] for place in np.unique(np.linspace(0, len(way) - 1, ON_THE_WAY).astype(int))] if way else []
        for name in (*few, *([stage] if stage in names else [])):
            found[f"Training captions: {name}"] = read_strip(names[name])
    return found


def natural(text: str) -> list[tuple[int, str]]:
    """Sorts tscd-2 before tscd-16."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def steps_text(count: int) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count} step" + ("" if count == 1 else "s")
