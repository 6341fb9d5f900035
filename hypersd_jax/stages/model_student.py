"""Pass on and export a model whose own weights are trained.

After the last stage OUTPUT/model holds it in diffusers' layout, which the next run or another program loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hypersd_jax.bases import StableDiffusion
from hypersd_jax.config import StageConfig
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import write_strips
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.export import export_model, require_finite, require_finite_images


def check_model(run: Run, stage: StageConfig) -> None:
    """Refuse models that ordinary training does not fit."""
    if run.base.is_inpainting or run.base.embeds_guidance:
        raise UserError(
            f"model: stages.{stage.name} does not train inpainting models or UNets that embed the guidance scale"
        )


def with_weights(base: StableDiffusion, trained: Mapping[str, Any]) -> StableDiffusion:
    """Return the model with trained weights, by component, in place of its own."""
    params = {name: {**part, **trained.get(name, {})} for name, part in base.params.items()}
    return base.around(dataclasses.replace(base.components, params=params))


def pass_on(
    run: Run, stage: StageConfig, trained: Mapping[str, Any], adjusted: Callable[[StableDiffusion], StableDiffusion]
) -> None:
    """Make the next stages start from the trained weights in an ``adjusted`` model; UserError if not finite."""
    require_finite(trained, stage)
    run.start_from(adjusted(with_weights(run.base, trained)))


def write_final_model(run: Run, stage: StageConfig) -> None:
    """Write the model atomically, in place of an earlier one, if the stage is the last."""
    if stage.name != run.config.active_stages[-1].name:
        return
    export_model(run.output.root / "model", run.base)


def write_images(
    run: Run, stage: StageConfig, name: str, images: Sequence[np.ndarray], prompts: Sequence[str], *, last: bool
) -> None:
    """Write rows of images to samples/NAME.png; UserError where a stage's ``last`` ones are not finite."""
    require_finite_images(images[-1], stage, name, last=last)
    if jax.process_index() == 0:
        write_strips(run.output.samples / f"{name}.png", images, prompts)
