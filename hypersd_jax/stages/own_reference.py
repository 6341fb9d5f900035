"""The teacher's samples of a dataset's own captions: few, so no more is generated than what the table shows.

What the embedded list generates anew, the second seed of a prompt here gives for nothing: other latents, and diversity.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from hypersd_jax.config import StageConfig
from hypersd_jax.evaluation import image_distance
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import reference
from hypersd_jax.stages.appraisal import Appraiser, Pictures, look
from hypersd_jax.stages.reference import Measured, Reference, calls_of, draw, kept_or_computed, measure

# Of the reference's contents; part of its identity.
FORMAT = 1
SECONDS = "seconds_per_image"


def own_reference(
    pipe: Pipeline,
    appraiser: Appraiser,
    few: Sequence[tuple[int, float]],
    *,
    guidance: float,
    batch_size: int,
    base: str,
    folder: Path,
) -> Reference:
    """The teacher at 25 steps and as ``few`` says, kept in ``folder``, or computed with a progress bar.

    Args:
        pipe: the base, without LoRAs.
        appraiser: the list, and what is measured.
        few: (steps, guidance) of the teacher at few steps, see `few_samplings`.
        guidance: the teacher's at 25 steps.
        batch_size: of the samples.
        base: fingerprint of the base's UNet.
        folder: where the reference is kept.
    """
    parts = {
        "format": FORMAT,
        "items": [list(item) for item in appraiser.items],
        "sampling": [reference.MANY_STEPS, guidance, [list(each) for each in few]],
        "base": [base, str(pipe.dtype), *pipe.native_size],
        "measured": [appraiser.measures_sets, appraiser.yardsticks.scorer is not None],
        # Its seconds are compared with the students'.
        "device": [jax.device_count(), jax.devices()[0].device_kind, batch_size],
    }
    identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def compute() -> Reference:
        return _as_kept(_compute(pipe, appraiser, few, guidance=guidance, batch_size=batch_size))

    found = kept_or_computed(folder / "reference.npz", identity, compute)

    teachers = tuple(dataclasses.replace(each, units=appraiser.units) for each in found.teachers)
    floor = found.floor
    if floor is not None and appraiser.units is not None:
        sizes = [len(places) for places in appraiser.same_prompt()]
        floor = dataclasses.replace(floor, units=np.repeat(np.arange(len(sizes)), sizes))
    return dataclasses.replace(found, floor=floor, teachers=teachers)


def few_samplings(stages: Sequence[StageConfig], guidance: float) -> list[tuple[int, float]]:
    """(steps, guidance) of the teacher at the students' steps, and at as many UNet calls, with guidance and without."""
    wanted = set()
    for stage in stages:
        for sampling in stage.samplings:
            calls = calls_of(sampling["steps"], sampling["guidance"])
            wanted |= {sampling["steps"], calls} | ({calls // 2} if calls % 2 == 0 else set())
    scales = (guidance, 0.0) if guidance > 1 else (guidance,)
    pairs = [(steps, scale) for scale in scales for steps in sorted(wanted, reverse=True)]
    return [pair for pair in pairs if pair != (reference.MANY_STEPS, guidance)]


def _compute(
    pipe: Pipeline, appraiser: Appraiser, few: Sequence[tuple[int, float]], *, guidance: float, batch_size: int
) -> Reference:
    items, many = appraiser.items, (reference.MANY_STEPS, guidance)
    settings: dict[str, Any] = {"sampler": "ddim", "batch_size": batch_size}
    for scale in dict.fromkeys((guidance, *(scale for _, scale in few))):  # compiles the first step and the others
        draw(pipe, items[:batch_size], steps=2, guidance=scale, **settings)
    total = sum(calls_of(*each) for each in (many, *few)) * len(items)
    with tqdm(total=total, unit="call", desc="teacher", disable=jax.process_index() != 0) as bar:

        def sampled(steps: int, scale: float) -> tuple[Pictures, dict[str, Any]]:
            images, seconds = draw(pipe, items, steps=steps, guidance=scale, **settings)
            pictures = look(images)
            bar.update(len(items) * calls_of(steps, scale))
            return pictures, {**appraiser.values(pictures, None), SECONDS: seconds}

        pictures, values = sampled(*many)
        teachers = []
        for steps, scale in few:
            mine, own = sampled(steps, scale)
            call: dict[str, Any] = {"steps": steps, "guidance": scale, "values": own}
            teachers.append(measure(mine, pictures, sets=appraiser.measures_sets, **call))
    floor = _other_latents(pictures, appraiser, guidance, values[SECONDS])
    return Reference(pictures=pictures, values=values, floor=floor, teachers=tuple(teachers))


def _as_kept(found: Reference) -> Reference:
    """With the numbers rounded as the file rounds them, so that a rerun which reads it gets the same results."""

    def rounded(each: Measured) -> Measured:
        return dataclasses.replace(each, distances=each.distances.astype(np.float32))

    seen = found.pictures.features.astype(np.float16).astype(np.float32)
    return dataclasses.replace(
        found,
        pictures=found.pictures._replace(features=seen),
        floor=None if found.floor is None else rounded(found.floor),
        teachers=tuple(map(rounded, found.teachers)),
    )


def _other_latents(pictures: Pictures, appraiser: Appraiser, guidance: float, seconds: float) -> Measured | None:
    """The teacher against itself: each sample's mean distance to those of its prompt from other latents."""
    images, distances = pictures.images, []
    for places in appraiser.same_prompt():
        for place in places:
            others = places[places != place]
            apart = image_distance(np.repeat(images[place][None], len(others), axis=0), images[others])
            distances.append(apart.mean())
    if not distances:
        return None
    return Measured(
        steps=reference.MANY_STEPS,
        guidance=guidance,
        fid=None,
        kid=None,
        distances=np.asarray(distances),
        values={"n": len(distances), SECONDS: seconds},
    )
