"""Pass on and export a model whose own weights are trained.

After the last stage OUTPUT/model holds it in diffusers' layout, which the next run or another program loads.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hypersd_jax.config import StageConfig
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import write_strips
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.export import require_finite, require_finite_images
from hypersd_jax.weights.components import Components
from hypersd_jax.weights.diffusers.component import host
from hypersd_jax.weights.diffusers.model import save_model


def check_model(run: Run, stage: StageConfig) -> None:
    """Refuse models that ordinary training does not fit."""
    components = run.base.components
    if components.is_inpainting or components.unet_config.time_cond_proj_dim:
        raise UserError(
            f"model: stages.{stage.name} does not train inpainting models or UNets that embed the guidance scale"
        )


def with_weights(components: Components, trained: Mapping[str, Any]) -> Components:
    """Return the components with trained weights in place of their own."""
    params = {name: {**part, **trained.get(name, {})} for name, part in components.params.items()}
    return dataclasses.replace(components, params=params)


def pass_on(
    run: Run, stage: StageConfig, trained: Mapping[str, Any], adjusted: Callable[[Components], Components]
) -> None:
    """Make the next stages start from the trained weights and ``adjusted`` components; UserError if not finite."""
    require_finite(trained, stage)
    run.start_from(adjusted(with_weights(run.base.components, trained)))


def write_final_model(run: Run, stage: StageConfig) -> None:
    """Write the model atomically, in place of an earlier one, if the stage is the last."""
    if stage.name != run.config.active_stages[-1].name:
        return
    components = run.base.components
    params = {name: {path: host(value) for path, value in part.items()} for name, part in components.params.items()}
    if jax.process_index() != 0:
        return
    target, new = run.output.root / "model", run.output.root / "model-new"
    for left in (*run.output.root.glob(".model-new.*.tmp"), new):
        shutil.rmtree(left, ignore_errors=True)
    save_model(components, new, params=params)
    shutil.rmtree(target, ignore_errors=True)
    new.replace(target)


def write_images(
    run: Run, stage: StageConfig, name: str, images: Sequence[np.ndarray], prompts: Sequence[str], *, last: bool
) -> None:
    """Write rows of images to samples/NAME.png; UserError where a stage's ``last`` ones are not finite."""
    require_finite_images(images[-1], stage, name, last=last)
    if jax.process_index() == 0:
        write_strips(run.output.samples / f"{name}.png", images, prompts)
