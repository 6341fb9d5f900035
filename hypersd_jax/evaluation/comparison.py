"""Few-step students of one base against it, the teacher: on the embedded list, or on a dataset's own captions."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from hypersd_jax.conditioning import warn_of_cuts
from hypersd_jax.evaluation.evaluator import Evaluated, Evaluator, Row, known_scorer
from hypersd_jax.evaluation.generator import Item, further_items, make_model, sample, timed_sample, warm_up
from hypersd_jax.evaluation.grid import GRID_ROWS
from hypersd_jax.evaluation.metrics import paired_margin, units_of
from hypersd_jax.evaluation.reference import SECONDS, Reference, Teacher, few_samplings, get_reference
from hypersd_jax.evaluation.samples import generate
from hypersd_jax.evaluation.sources import embedded_items, training_images
from hypersd_jax.evaluation.tables import steps_text
from hypersd_jax.pipeline import Pipeline

FEW_STEPS = (8, 4, 2, 1)
"""Of the teacher on the embedded list, with guidance and without; its rows at these ship with the package."""

SETS_LEAST = 128
"""Of fewer samples of a dataset's own captions no FID or KID is given: chance would decide them."""

SEEDS = 8
"""Of one prompt of the embedded list, shown side by side."""

HARD = " (hard)"
"""Behind the prompts of a grid on which the teacher is worst, a quarter of them."""

LEFT_OUT = ("feature_distance", "patch_kid_train", "precision", "recall")
"""What the reference that ships does not hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """The result of a stage of training.

    Attributes:
        name: of the stage.
        path: of its LoRA file or its model folder.
        is_model: whether it is a model folder.
        samplings: how it is sampled, in the keywords of a pipeline: one row of the table each.
    """

    name: str
    path: Path
    is_model: bool
    samplings: Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a comparison.

    Attributes:
        rows: of results.json.
        columns: title of a column of the grid -> its images (N, H, W, 3).
        prompts: those of the grid's rows, the hard ones marked.
        ranked: whether these rows go from the teacher's best to its worst, or are just the list's first.
        seeds: of all samples.
        seeds_columns: as ``columns``, of one prompt from the seeds 0 to 7; {} where the list is not the embedded one.
        seeds_prompt: that prompt.
        seconds: what the comparison took.
    """

    rows: Sequence[Row]
    columns: Mapping[str, np.ndarray]
    prompts: Sequence[str]
    ranked: bool
    seeds: Sequence[int]
    seeds_columns: Mapping[str, np.ndarray]
    seeds_prompt: str = ""
    seconds: float


def embedded_evaluator(pipe: Pipeline, n: int, groups: Sequence[str] | None) -> Evaluator:
    """Make the evaluator of the embedded list: its first ``n`` prompts, and as many training images of ``groups``."""
    items, side = embedded_items(n, groups), pipe.native_size[0]
    evaluator = Evaluator(
        items=items,
        further=further_items(items),
        size=pipe.native_size,
        scorer=known_scorer(items),
        left_out=LEFT_OUT,
    )
    return evaluator.with_real(training_images(n, groups, side))


def embedded_teacher(pipe: Pipeline, base: str, guidance: float, batch_size: int) -> Teacher:
    """The teacher on the embedded list: of few steps those that ship with the package."""
    few = tuple((steps, scale) for scale in (guidance, 0.0) for steps in FEW_STEPS)
    return Teacher(pipe=pipe, base=base, guidance=guidance, few=few, batch_size=batch_size)


def dataset_teacher(
    pipe: Pipeline, base: str, guidance: float, batch_size: int, samplings: Sequence[Mapping[str, Any]]
) -> Teacher:
    """The teacher on a dataset's own captions: at the steps of these samplings, and at as many UNet calls."""
    few = few_samplings(samplings, guidance)
    return Teacher(pipe=pipe, base=base, guidance=guidance, few=few, batch_size=batch_size)


def dataset_evaluator(pipe: Pipeline, captions: Sequence[str], n: int) -> Evaluator:
    """Make the evaluator of a dataset's own captions: ``n`` samples, dealt out in turn, sample i from seed i.

    They are few, so that no further seeds are generated: diversity is that of a caption's seeds in the list.
    """
    texts = list(dict.fromkeys(captions))
    items = tuple(Item(texts[seed % len(texts)], seed) for seed in range(n))
    return Evaluator(
        items=items,
        further=(),
        size=pipe.native_size,
        scorer=known_scorer(items),
        least=SETS_LEAST,
        left_out=LEFT_OUT,
    )


def compare(teacher: Teacher, students: Sequence[Student], evaluator: Evaluator, folder: Path) -> Outcome:
    """Measure the teacher, or read what is known of it, and every student.

    Args:
        teacher: the base, and how it is sampled.
        students: of that base.
        evaluator: of one of the functions above.
        folder: where a reference that is computed is kept.
    """
    begin, items = time.perf_counter(), evaluator.items
    size = teacher.batch_size
    warn_of_cuts(teacher.pipe.base.prompts.cuts(list(dict.fromkeys(item.prompt for item in items))))
    reference, measuring = get_reference(teacher, evaluator, folder)
    match = reference.rows[0].match
    shown = shown_rows([item.prompt for item in items], match)
    few = filled([items[index] for index in shown], min(size, len(items)))
    one = items[shown[len(shown) // 2]].prompt
    seeds = filled([Item(one, seed) for seed in range(SEEDS)], min(size, len(items))) if evaluator.further else []
    rows = _timed([each.row for each in reference.rows], teacher, items)
    first = f"teacher {steps_text(rows[0]['steps'])}"
    columns, seeds_columns = {first: reference.samples.images[shown]}, {}
    if seeds:
        seeds_columns[first] = sample(teacher.many, seeds, batch_size=size)[:SEEDS]
    each_sampling = [(student, sampling) for student in students for sampling in student.samplings]
    for student, sampling in tqdm(each_sampling, desc="comparing", unit="student", disable=jax.process_index() != 0):
        steps = steps_text(sampling["steps"])
        if f"teacher {steps}" not in columns:
            model = teacher.model(sampling["steps"], teacher.guidance)
            columns[f"teacher {steps}"] = sample(model, few, batch_size=size)[: len(shown)]
        with _loaded(teacher.pipe, student) as pipe:
            model = make_model(student.name, pipe, **sampling)
            samples = generate(model, items, evaluator.further, batch_size=size)
            of_seeds = sample(model, seeds, batch_size=size)[:SEEDS] if seeds else None
        found = measuring.evaluate(samples, model)
        rows.append(found.row | _margin(found, reference, [item.prompt for item in items]))
        label = f"student {steps}"
        label = f"{student.name}, {steps}" if label in columns else label
        columns[label] = samples.images[shown]
        if of_seeds is not None:
            seeds_columns[label] = of_seeds
    return Outcome(
        rows=rows,
        columns=columns,
        prompts=marked([items[index].prompt for index in shown], hard=0 if match is None else len(shown) // 4),
        ranked=match is not None,
        seeds=[item.seed for item in items],
        seeds_columns=seeds_columns,
        seeds_prompt=one,
        seconds=time.perf_counter() - begin,
    )


def shown_rows(prompts: Sequence[str], match: np.ndarray | None) -> list[int]:
    """Choose the rows of the grid, each prompt once: they span the range from the teacher's best to its worst.

    Args:
        prompts: of the list; where all are one, its images are told apart by their seeds.
        match: how well the teacher's images fit them, (N,); None: the first prompts are taken.
    """
    candidates = [*{prompt: index for index, prompt in reversed([*enumerate(prompts)])}.values()][::-1]
    candidates = candidates if len(candidates) > 1 else [*range(len(prompts))]
    count = min(GRID_ROWS, len(candidates))
    if match is None:
        return candidates[:count]
    ranked = sorted(candidates, key=lambda index: -float(match[index]))
    return [ranked[int((row + 0.5) * len(ranked) / count)] for row in range(count)]


def marked(prompts: Sequence[str], *, hard: int) -> list[str]:
    """Mark the last ``hard`` of these prompts."""
    easy = len(prompts) - hard
    return [*prompts[:easy], *(prompt + HARD for prompt in prompts[easy:])]


def filled(items: Sequence[Item], size: int) -> list[Item]:
    """Repeat items up to a batch of ``size``, for which programs are compiled already."""
    return [items[index % len(items)] for index in range(max(size, len(items)))]


def _timed(rows: Sequence[Row], teacher: Teacher, items: Sequence[Item]) -> list[Row]:
    """Rows with the seconds an image takes, measured on a full batch here and now where they are not known."""
    unknown = dict.fromkeys((row["steps"], row["guidance"]) for row in rows if SECONDS not in row)
    batch, size = items[: teacher.batch_size], teacher.batch_size
    seconds = {}
    for sampling in tqdm(unknown, desc="timing the teacher", disable=jax.process_index() != 0 or not unknown):
        model = teacher.model(*sampling)
        warm_up(model, batch, size)
        seconds[sampling] = timed_sample(model, batch, batch_size=size)[1]
    return [row if SECONDS in row else {**row, SECONDS: seconds[row["steps"], row["guidance"]]} for row in rows]


@contextlib.contextmanager
def _loaded(pipe: Pipeline, student: Student) -> Iterator[Pipeline]:
    """The base under the student's LoRA, as long as this lasts, or the model that the student is."""
    if student.is_model:
        yield Pipeline.from_pretrained(student.path, dtype=pipe.dtype, mesh=pipe.mesh)
        return
    pipe.load_lora(student.path, name=student.name)
    try:
        yield pipe
    finally:
        pipe.unload_lora(student.name)


def _margin(found: Evaluated, reference: Reference, prompts: Sequence[str]) -> Row:
    """A student's margin over the nearest teacher at as many UNet calls, where there is one."""
    baselines = [each for each in reference.few if each.row["calls"] == found.row["calls"]]
    if not baselines or found.distances is None:
        return {}
    nearest = min(baselines, key=lambda each: float(each.row["distance"]))
    assert nearest.distances is not None
    margin = paired_margin(found.distances, nearest.distances, units_of(prompts))
    row = {
        "margin": margin.mean,
        "margin_se": margin.standard_error,
        "baseline": f"{steps_text(nearest.row['steps'])}, guidance {nearest.row['guidance']:g}",
    }
    kids = [each.row["kid"] for each in baselines if "kid" in each.row]
    return {**row, "kid_margin": min(kids) - found.row["kid"]} if kids and "kid" in found.row else row
