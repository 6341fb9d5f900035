"""Export a student as a file: a LoRA that says in its header how to sample with it, or a model."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypersd_jax.adapters import Adapter
from hypersd_jax.bases import TextToImage
from hypersd_jax.config import Sampling, StageConfig
from hypersd_jax.diffusion import solver_table
from hypersd_jax.errors import UserError
from hypersd_jax.interop.beside import SETTINGS, WORKFLOW, beside, write_beside
from hypersd_jax.interop.recipe import base_name, make_recipe
from hypersd_jax.weights.lora import write_lora
from hypersd_jax.weights.placement import host
from hypersd_jax.weights.tensors import open_tensors

# The grid of the TCD and LCM samplers, on which a unified LoRA without a consistency regulariser samples.
UNIFIED_GRID = 50


def sampling_header(stage: StageConfig, scheduler_config: dict[str, Any]) -> dict[str, str]:
    """Return the header that says how to sample with the stage's student: sampler, timesteps, guidance.

    Raises:
        UserError: the sampler has no such steps on this model's schedule.
    """
    sampling = stage.samplings[0]
    table = sampling_table(stage, sampling, scheduler_config)
    return {
        "steps": str(sampling["steps"]),
        "sampler": sampling["sampler"],
        "timesteps": json.dumps([int(t) for t in table["timesteps"]]),
        "eta": str(sampling["eta"]),
        "guidance": str(sampling["guidance"]),
        "original_inference_steps": str(stage.grid or UNIFIED_GRID),
    }


def sampling_table(stage: StageConfig, sampling: Sampling, scheduler_config: dict[str, Any]) -> Mapping[str, Any]:
    """Return the solver's table for one way of sampling the stage's student; UserError where there is none."""
    return solver_table(
        sampling["sampler"],
        sampling["steps"],
        eta=sampling["eta"],
        scheduler_config={**scheduler_config, "original_inference_steps": stage.grid or UNIFIED_GRID},
        timesteps=sampling["timesteps"],
    )


def require_finite(weights: Any, stage: StageConfig) -> None:
    """Refuse a student that is not finite (UserError): nobody would see it in the file.

    Every process calls this: a leaf that is sharded over several is gathered from all, one tensor at a time.
    """
    for leaf in jax.tree.leaves(weights):
        if not np.isfinite(host(leaf)).all():
            raise UserError(
                f"stages.{stage.name}: its weights are not finite after {stage.updates} updates, so nothing of it is "
                f"exported; lower stages.{stage.name}.learning_rate ({stage.learning_rate:g}), and name another "
                f"output_dir or delete this one"
            )


def require_finite_images(images: np.ndarray, stage: StageConfig, name: str, *, last: bool) -> None:
    """Report images (N, H, W, 3) that are not finite: a UserError for a stage's ``last`` ones, else a warning."""
    bad = int(np.sum(~np.isfinite(images).all(axis=(1, 2, 3))))
    if not bad:
        return
    what = f"{bad} of {len(images)} images sampled with its student are not finite"
    if last:
        raise UserError(
            f"stages.{stage.name}: {what}, so nothing of it is exported; lower stages.{stage.name}.learning_rate "
            f"({stage.learning_rate:g}), and name another output_dir or delete this one"
        )
    warnings.warn(f"samples/{name}.png, stage {stage.name}: {what}", stacklevel=3)


def export_student(
    path: Path,
    adapter: Adapter,
    stage: StageConfig,
    base: TextToImage,
    *,
    base_fingerprint: str,
    states_sampling: bool = True,
) -> None:
    """Write the student in kohya layout, atomically; its header says how to sample with it, where the stage does."""
    for unfinished in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed while it wrote
        unfinished.unlink()
    metadata = {
        **(sampling_header(stage, dict(base.scheduler_config)) if states_sampling and stage.states_sampling else {}),
        "base_fingerprint": base_fingerprint,
        "ss_base_model_version": base.kohya_family,
        "ss_training_comment": f"hypersd_jax {stage.summary}",
    }
    write_lora(path, {base.denoiser: adapter}, layout="kohya", metadata=metadata, dtype=np.float32)


def write_guides(path: Path, base: TextToImage, prompt: str, *, anew: bool) -> None:
    """Write beside a student's LoRA how to sample with it in other programs (`interop.beside`).

    Args:
        path: the LoRA.
        base: its base.
        prompt: the example in them.
        anew: whether to replace those that are there.
    """
    if not anew and all(beside(path, ending).exists() for ending in (WORKFLOW, SETTINGS)):
        return
    with open_tensors(path) as file:
        metadata = file.metadata
    recipe = make_recipe(
        path,
        metadata,
        base=base_name(base.source),
        family=base.kohya_family,
        scheduler_config=base.scheduler_config,
        size=(base.image_side, base.image_side),
        prompt=prompt,
        embeds_guidance=base.embeds_guidance,
    )
    write_beside(path, recipe)


def export_model(folder: Path, base: TextToImage) -> None:
    """Write a model in diffusers' layout, atomically, in place of an earlier one.

    Every process calls this: a leaf that is sharded over several is gathered from all.
    """
    params = {name: {path: host(value) for path, value in part.items()} for name, part in base.params.items()}
    if jax.process_index() != 0:
        return
    new = folder.with_name(f"{folder.name}-new")
    for left in (*folder.parent.glob(f".{new.name}.*.tmp"), new):
        shutil.rmtree(left, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    base.save(new, params)
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)
