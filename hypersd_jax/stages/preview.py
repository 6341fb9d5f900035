"""Students drawn with while training, and written down after it."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from hypersd_jax import adapters
from hypersd_jax.config import AdapterStage
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.export import export_model, export_student, is_whole, sampling_header, student_path, with_unet
from hypersd_jax.stages.jobs import Run
from hypersd_jax.stages.result_files import write_strips
from hypersd_jax.stages.student import student_sampling
from hypersd_jax.weights.folder import host

NAME = "preview"


def finish(run: Run, stage: AdapterStage, student: Any) -> None:
    """Export the student, and draw with it, which also proves that it is not the base."""
    path = student_path(run.output, stage)
    if is_whole(stage):
        export_model(path, student, run.pipe.components)
    else:
        adapter = jax.tree.map(host, adapters.join(student, run.scales))
        if jax.process_index() == 0:
            export_student(path, adapter, stage, run.pipe.components, base_fingerprint=run.base_fingerprint)
    preview(run, stage, student, stage.name)


def preview(run: Run, stage: AdapterStage, student: Any, name: str) -> None:
    """Draw the data's first prompts with the student at its own step count: a strip of pictures, samples/NAME.png.

    The base draws them too, with the same program, and they must come out different: a preview of a model whose adapter
    was left off has fooled whole training runs.
    """
    prompts = list(run.preview_prompts)
    # The comparison's batch size, so that both share their compiled programs.
    settings: dict[str, Any] = {"output": "np", "batch_size": run.config.evaluation.batch_size, "stepwise": True}
    if is_whole(stage):
        pipe = Pipeline(with_unet(run.pipe.components, student), dtype=run.pipe.dtype, mesh=run.mesh)
        settings |= student_sampling(stage)
        images, base = (each(prompts, **settings) for each in (pipe, run.pipe))
    else:
        header = sampling_header(stage, dict(run.pipe.components.scheduler_config))
        run.pipe.add_lora(NAME, {"unet": adapters.join(student, run.scales)}, metadata=header)
        try:
            images = run.pipe(prompts, **settings)
            run.pipe.set_lora_scale(NAME, 0.0)
            base = run.pipe(prompts, **settings)
        finally:
            run.pipe.unload_lora(NAME)
    if _digest(images) == _digest(base):
        raise RuntimeError(f"stage {stage.name}: the student draws exactly as the base does; its adapter is not on")
    if jax.process_index() == 0:
        write_strips(run.output.samples / f"{name}.png", [images], prompts)


def _digest(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
