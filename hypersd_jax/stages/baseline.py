"""What a run's students are compared with: the list of prompts, and the teacher's samples of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hypersd_jax.config import Config
from hypersd_jax.data import evaluation_list
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.appraisal import Appraiser, Item, make_appraiser, own_appraiser
from hypersd_jax.stages.own_reference import few_samplings, own_reference
from hypersd_jax.stages.reference import Reference, draw, get_reference

GRID_ROWS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """A list with the teacher's samples of it.

    Attributes:
        items: prompts with the seeds of their latents.
        guidance: the teacher's.
        reference: its samples, measured.
        appraiser: what measures the students.
        seconds: (steps, guidance) -> seconds an image takes the teacher, where the reference does not hold them.
        shown: rows of the grid, from the beginning of the list.
    """

    items: Sequence[Item]
    guidance: float
    reference: Reference
    appraiser: Appraiser
    seconds: Mapping[tuple[int, float], float]
    shown: int


def get_baseline(config: Config, pipe: Pipeline, base: str, folder: Path, prompts: Sequence[str]) -> Baseline:
    """That of the run's data: the embedded list of held-out captions, or the first captions of the user's dataset.

    Args:
        config: the run's.
        pipe: the base, without LoRAs.
        base: fingerprint of the base's UNet.
        folder: where a reference that is computed is kept.
        prompts: the first captions of a dataset of one's own.
    """
    settings, groups = config.evaluation, config.data.groups
    size = settings.batch_size
    drawing: dict[str, Any] = {"batch_size": size, "base": base, "folder": folder}
    if config.on_emoji:
        assert settings.guidance is not None
        items = evaluation_list(config.compared_samples, groups=groups)
        reference = get_reference(pipe, items, groups=groups, guidance=settings.guidance, **drawing)
        return Baseline(
            items=items,
            guidance=settings.guidance,
            reference=reference,
            appraiser=make_appraiser(items, groups, pipe.native_size[0]),
            seconds=_timed(pipe, items[:size], reference),
            shown=min(GRID_ROWS, len(items)),
        )
    guidance = float(pipe.settings(sampler="ddim", guidance=settings.guidance).guidance or 0.0)
    appraiser = own_appraiser(prompts, config.compared_samples)
    few = few_samplings(config.adapter_stages, guidance)
    reference = own_reference(pipe, appraiser, few, guidance=guidance, **drawing)
    texts = {item.prompt for item in appraiser.items}
    return Baseline(
        items=appraiser.items,
        guidance=guidance,
        reference=reference,
        appraiser=appraiser,
        seconds={},
        # Each prompt once.
        shown=min(GRID_ROWS, len(texts)) if len(texts) > 1 else min(GRID_ROWS, len(appraiser.items)),
    )


def _timed(pipe: Pipeline, items: Sequence[Item], reference: Reference) -> dict[tuple[int, float], float]:
    """(steps, guidance) -> seconds a picture takes the teacher, in one full batch, after a first one that compiles."""
    seconds = {}
    rows = ([] if reference.floor is None else [reference.floor]) + list(reference.teachers)
    for row in tqdm(rows, desc="timing the teacher", unit="model"):
        options: dict[str, Any] = {"guidance": row.guidance, "sampler": "ddim", "batch_size": len(items)}
        draw(pipe, items, steps=row.steps, **options)
        _, seconds[row.steps, row.guidance] = draw(pipe, items, steps=row.steps, **options)
    return seconds
