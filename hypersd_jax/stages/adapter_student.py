"""Sample, export and pass on a student: a LoRA on the frozen base, or a fully fine-tuned UNet."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax import adapters
from hypersd_jax.config import StageConfig
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import write_strips
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.pipeline.arguments import NotFiniteWarning
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.export import (
    export_model,
    export_student,
    require_finite,
    require_finite_images,
    sampling_header,
    write_guides,
)
from hypersd_jax.training.first_process import from_first
from hypersd_jax.weights.placement import host

NAME = "preview"


def check(run: Run) -> None:
    """Refuse (UserError) base models that no adapter is trained on yet."""
    if run.base.embeds_guidance:
        raise UserError("model: it embeds the guidance scale (time_cond_proj_dim), which no stage trains yet")
    if run.base.is_inpainting:
        raise UserError("model: an inpainting model, which no stage trains")


def finish(run: Run, stage: StageConfig, student: Any, *, trained: bool) -> None:
    """Sample with the student, which also proves that it is not the base, export it, and pass it on to the run.

    Raises:
        UserError: its weights or its images are not finite, and nothing is exported.
    """
    path = run.output.student(stage)
    written = trained or not from_first(path.exists())
    if written:
        require_finite(student, stage)
        preview(run, stage, student, stage.name, last=True)
        if stage.exports_model:
            export_model(path, run.base.with_weights({run.base.denoiser: student}))
        else:
            adapter = jax.tree.map(host, adapters.join(student, run.scales))
            if jax.process_index() == 0:
                export_student(path, adapter, stage, run.base, base_fingerprint=run.base_fingerprint)
    if jax.process_index() == 0 and not stage.exports_model:
        write_guides(path, run.base, run.preview_prompts[0], anew=written)
    run.student = student
    later = run.config.adapter_stages[[each.name for each in run.config.adapter_stages].index(stage.name) + 1 :]
    if any(stage.name in each.teachers for each in later):
        run.students[stage.name] = adapters.join(student, run.scales)


def preview(run: Run, stage: StageConfig, student: Any, name: str, *, last: bool = False) -> None:
    """Sample the data's first prompts with the student at its own step count: a strip of images, samples/NAME.png.

    The base samples them too, with the same program. Where the images are equal, the student is perturbed so much
    that its images must differ: a preview of a model whose adapter was left off has fooled whole training runs. A
    student that has hardly moved yet only causes a warning.

    Raises:
        UserError: the ``last`` preview of a stage has images that are not finite, while the base's are.
    """
    untrained = None if stage.exports_model else jax.tree.map(jnp.zeros_like, student)
    images, base = _sampled(run, stage, student), _sampled(run, stage, untrained)
    require_finite_images(images, stage, name, last=last and bool(np.isfinite(base).all()))
    if np.array_equal(images, base, equal_nan=True):
        if np.array_equal(_sampled(run, stage, _perturbed(stage, student)), base, equal_nan=True):
            raise RuntimeError(
                f"stage {stage.name}: the student samples just what the base does; its adapter is not on"
            )
        warnings.warn(
            f"samples/{name}.png: the student of {stage.name} samples exactly what the base does; what it has learned "
            f"so far is too little to be seen in {np.dtype(run.pipe.dtype).name}",
            stacklevel=2,
        )
    if jax.process_index() == 0:
        write_strips(run.output.samples / f"{name}.png", [images], run.preview_prompts)


def _sampled(run: Run, stage: StageConfig, student: Any) -> np.ndarray:
    """Sample the preview prompts once each."""
    return sample(run, stage, student, run.preview_prompts, 1)


def sample(run: Run, stage: StageConfig, student: Any, prompts: Sequence[str], count: int) -> np.ndarray:
    """Sample ``count`` images of each prompt with a student's LoRA factors or UNet, or with the base (None).

    Returns:
        (N, H, W, 3) in 0..1, a prompt's images side by side.
    """
    prompts = list(prompts)
    # The comparison's batch size, so that both share their compiled programs.
    settings: dict[str, Any] = {"output": "np", "batch_size": run.config.evaluation.batch_size, "stepwise": True}
    settings["num_images"] = count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotFiniteWarning)  # `require_finite_images` says it with the stage's name
        if stage.exports_model:
            settings |= stage.samplings[0]
            pipe = run.pipe
            if student is not None:
                pipe = Pipeline(run.base.with_weights({run.base.denoiser: student}))
            return np.asarray(pipe(prompts, **settings))
        header = sampling_header(stage, dict(run.base.scheduler_config))
        run.pipe.add_lora(NAME, {run.base.denoiser: adapters.join(student, run.scales)}, metadata=header)
        try:
            return np.asarray(run.pipe(prompts, **settings))
        finally:
            run.pipe.unload_lora(NAME)


def _perturbed(stage: StageConfig, student: Any) -> Any:
    """Add noise of deviation 1 to all LoRA factors, or to the vectors of a fully fine-tuned network."""

    def perturb(path: Any, leaf: Any) -> Any:
        if stage.exports_model and leaf.ndim > 1:
            return leaf
        random = np.random.default_rng(len(jax.tree_util.keystr(path)))
        return leaf + random.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(perturb, student)
