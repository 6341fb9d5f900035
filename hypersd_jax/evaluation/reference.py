"""The reference of students: the teacher's many-step images of a list, and its rows at many and few steps.

Of the images only the many-step ones are kept; of the others, their rows and distances. For the embedded teacher all
this ships with the package; for any other it is computed once and kept with the run.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import generator
from hypersd_jax.evaluation.evaluator import Evaluated, Evaluator, digest, estimate_values, same_prompt, scorer_digest
from hypersd_jax.evaluation.generator import Model, calls_of, make_model, moved
from hypersd_jax.evaluation.metrics import image_distance, mean_estimate
from hypersd_jax.evaluation.provenance import device_line
from hypersd_jax.evaluation.samples import Samples, generate
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights.components import assets

TEACHER, OTHER_LATENTS = "teacher", "teacher, other latents"
# Of the file's contents; part of its identity.
FORMAT = 3
SECONDS = "seconds_per_image"
SHIPPED = assets() / "reference" / "teacher.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The base that students are compared with, and how it is sampled.

    Attributes:
        pipe: without LoRAs.
        base: fingerprint of its UNet.
        guidance: at many steps.
        few: (steps, guidance) of its other rows.
        batch_size: images at a time.
    """

    pipe: Pipeline
    base: str
    guidance: float
    few: tuple[tuple[int, float], ...]
    batch_size: int

    def model(self, steps: int, guidance: float) -> Model:
        """Return the teacher at this number of steps and guidance, by ddim."""
        return make_model(TEACHER, self.pipe, sampler="ddim", steps=steps, guidance=guidance)

    @property
    def many(self) -> Model:
        """The teacher at the reference's number of steps."""
        return self.model(generator.MANY_STEPS, self.guidance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """The teacher, measured.

    Attributes:
        samples: at many steps; without what the scorer sees in them.
        rows: first that of those samples; then, where each prompt has several seeds, that of the same model from other
            latents, which a perfect student could not be distinguished from; then those at few steps.
    """

    samples: Samples
    rows: tuple[Evaluated, ...]

    @property
    def few(self) -> tuple[Evaluated, ...]:
        """The rows at few steps."""
        return tuple(each for each in self.rows[1:] if each.row["model"] == TEACHER)


def get_reference(teacher: Teacher, evaluator: Evaluator, folder: Path) -> tuple[Reference, Evaluator]:
    """The reference of this teacher and list: shipped, kept in ``folder``, or computed with a progress bar.

    Several processes compute it together, unless all of them see the file; the first one keeps it.

    Returns:
        the reference, and the evaluator that measures against it.
    """
    identity = reference_identity(teacher, evaluator)
    device = f"{device_line()}, batches of {teacher.batch_size}"
    path = folder / "reference.npz"
    found = load_reference(SHIPPED, identity, evaluator, device)
    if found is None:
        found = load_reference(path, identity, evaluator, device)
        if not np.all(multihost_utils.process_allgather(np.asarray(found is not None))):
            found = compute_reference(teacher, evaluator)
            if jax.process_index() == 0:
                save_reference(path, found, identity, device)
    assert found is not None
    measuring = evaluator.with_reference(found.samples, dataclasses.asdict(teacher.many.settings))
    rows = tuple(each._replace(row={**each.row, "protocol": measuring.protocol}) for each in found.rows)
    return Reference(samples=found.samples, rows=rows), measuring


def compute_reference(teacher: Teacher, evaluator: Evaluator) -> Reference:
    """Sample and measure the teacher at many steps, from other latents, and at few steps."""
    items, further = evaluator.items, evaluator.further
    again = sum(map(len, further))
    many = len(items) * (2 if further else 1) + again - (len(further[0]) if further else 0)
    total = many * teacher.many.calls + sum(calls_of(*each) for each in teacher.few) * (len(items) + again)
    call: dict[str, Any] = {"batch_size": teacher.batch_size}
    with tqdm(total=total, unit="call", desc="teacher", disable=jax.process_index() != 0) as bar:
        samples = generate(teacher.many, items, further[1:], **call)
        # Rounded as the file rounds them, so that a rerun which reads it gets the same results.
        samples = dataclasses.replace(samples, features=samples.features.astype(np.float16).astype(np.float32))
        other = None
        if further:  # both are one model, whose diversity is that of all seeds together
            first = len(further[0])
            elsewhere = generate(teacher.many, moved(items, generator.FURTHER_SEEDS[0]), **call)
            other = dataclasses.replace(elsewhere, items=items, further=(samples.features[:first], *samples.further))
            samples = dataclasses.replace(samples, further=(other.features[:first], *samples.further))
        bar.update(many * teacher.many.calls)
        measuring = evaluator.with_reference(samples, None)
        rows = [measuring.evaluate(samples, teacher.many)]
        if other is not None:
            rows.append(measuring.evaluate(other, dataclasses.replace(teacher.many, name=OTHER_LATENTS)))
        elif (listed := _from_the_list(samples, teacher.many)) is not None:
            rows.append(listed)
        for steps, guidance in teacher.few:
            model = teacher.model(steps, guidance)
            rows.append(measuring.evaluate(generate(model, items, further, **call), model))
            bar.update(calls_of(steps, guidance) * (len(items) + again))
    return Reference(samples=samples, rows=tuple(rows))


def _from_the_list(samples: Samples, model: Model) -> Evaluated | None:
    """The teacher against itself: each sample's mean distance to those of its prompt from other latents in the list."""
    images, distances, units = samples.images, [], []
    for number, group in enumerate(same_prompt([item.prompt for item in samples.items])):
        for index in group:
            others = group[group != index]
            distances.append(image_distance(np.repeat(images[index][None], len(others), axis=0), images[others]).mean())
            units.append(number)
    if not distances:
        return None
    settings = model.settings
    row = {"model": OTHER_LATENTS, "sampler": settings.sampler, "steps": settings.steps, "guidance": settings.guidance}
    mean = mean_estimate(np.asarray(distances), np.asarray(units) if units[-1] else None)
    row |= {"calls": model.calls, "n": len(distances), **estimate_values("distance", mean)}
    return Evaluated({**row, SECONDS: samples.seconds}, None)


def reference_identity(teacher: Teacher, evaluator: Evaluator) -> str:
    """Name what a reference belongs to: list, seeds, real images, base, guidance, steps, size and scorer."""
    return digest(
        {
            "format": FORMAT,
            "items": [list(item) for item in evaluator.items],
            "further": [[list(item) for item in items] for items in evaluator.further],
            "real": evaluator.real_name,
            "base": teacher.base,
            "size": list(evaluator.size),
            "sampling": [generator.MANY_STEPS, teacher.guidance, [list(each) for each in teacher.few]],
            "scorer": None if evaluator.scorer is None else scorer_digest(evaluator.scorer),
            "least": evaluator.least,
        }
    )


def save_reference(path: Path, reference: Reference, identity: str, device: str) -> None:
    """Write a reference as one .npz file, atomically; features in float16.

    Args:
        path: of the file.
        reference: what is written.
        identity: see `reference_identity`.
        device: on which the seconds were measured; on another they are not read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(".tmp-" + path.name)
    unknown = np.full(len(reference.samples.images), np.nan, np.float32)
    match = reference.rows[0].match
    np.savez_compressed(
        temporary,
        identity=np.asarray(identity),
        device=np.asarray(device),
        images=reference.samples.images,
        features=reference.samples.features.astype(np.float16),
        rows=np.asarray(json.dumps([each.row for each in reference.rows])),
        match=unknown if match is None else match,
        distances=np.stack([unknown if each.distances is None else each.distances for each in reference.rows]),
    )
    temporary.replace(path)


def load_reference(path: Path, identity: str, evaluator: Evaluator, device: str) -> Reference | None:
    """Read a reference back, with its seconds if they were measured on this device.

    None where there is no file, or one of another identity; UserError where it is damaged.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if str(file["identity"]) != identity:
                return None
            rows: list[dict[str, Any]] = json.loads(str(file["rows"]))
            if str(file["device"]) != device:
                rows = [{key: value for key, value in row.items() if key != SECONDS} for row in rows]
            images = file["images"]
            samples = Samples(
                items=evaluator.items,
                images=images,
                features=file["features"].astype(np.float32),
                seen=np.empty((len(images), 0), np.float32),
            )
            distances = [None if np.isnan(each).any() else each for each in file["distances"]]
            measured = [Evaluated(row, each) for row, each in zip(rows, distances, strict=True)]
            if not np.isnan(match := file["match"]).any():
                measured[0] = measured[0]._replace(match=match)
            return Reference(samples=samples, rows=tuple(measured))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: the reference is damaged ({error}); delete the file") from None


def few_samplings(samplings: Sequence[Any], guidance: float) -> tuple[tuple[int, float], ...]:
    """(steps, guidance) of the teacher at the students' steps, and at as many UNet calls, with guidance and without."""
    wanted = set()
    for sampling in samplings:
        calls = calls_of(sampling["steps"], sampling["guidance"])
        wanted |= {sampling["steps"], calls} | ({calls // 2} if calls % 2 == 0 else set())
    scales = (guidance, 0.0) if guidance > 1 else (guidance,)
    pairs = [(steps, scale) for scale in scales for steps in sorted(wanted, reverse=True)]
    return tuple(pair for pair in pairs if pair != (generator.MANY_STEPS, guidance))
