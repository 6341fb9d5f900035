"""Pass on and export a model whose own weights are trained.

After the last stage OUTPUT/model holds it in diffusers' layout, which the next run or another program loads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hypersd_jax.bases import TextToImage
from hypersd_jax.config import StageConfig
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import write_strips
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.export import export_model, require_finite, require_finite_images


def check_model(run: Run, stage: StageConfig) -> None:
    """Refuse models that ordinary training does not fit."""
    if run.base.is_inpainting or run.base.embeds_guidance:
        raise UserError(
            f"model: stages.{stage.name} does not train inpainting models, or those that embed the guidance scale"
        )


def pass_on(
    run: Run, stage: StageConfig, trained: Mapping[str, Any], adjusted: Callable[[TextToImage], TextToImage]
) -> None:
    """Make the next stages start from the trained weights in an ``adjusted`` model; UserError if not finite."""
    require_finite(trained, stage)
    run.start_from(adjusted(run.base.with_weights(trained)))


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
