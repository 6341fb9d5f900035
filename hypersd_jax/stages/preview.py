"""Pictures drawn while training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypersd_jax.adapters import Adapter
from hypersd_jax.config import ConsistencyStage
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.export import sampling_header
from hypersd_jax.stages.result_files import write_strips

NAME = "preview"


def draw_preview(
    pipe: Pipeline, adapter: Adapter, stage: ConsistencyStage, prompts: Sequence[str], path: Path, *, batch_size: int
) -> None:
    """Draw ``prompts`` with the student at its own step count: a strip of pictures, written to ``path``.

    The same program at scale 0 draws the base's pictures, which must be others: a preview of a model whose adapter was
    left off has fooled whole training runs.
    """
    settings: dict[str, Any] = {"output": "np", "batch_size": batch_size, "stepwise": True}
    header = sampling_header(stage, dict(pipe.components.scheduler_config))
    pipe.add_lora(NAME, {"unet": adapter}, metadata=header)
    try:
        images = pipe(list(prompts), **settings)
        pipe.set_lora_scale(NAME, 0.0)
        base = pipe(list(prompts), **settings)
    finally:
        pipe.unload_lora(NAME)
    if _digest(images) == _digest(base):
        raise RuntimeError(f"stage {stage.name}: the student draws exactly as the base does; its adapter is not on")
    if jax.process_index() == 0:
        write_strips(path, [images])


def _digest(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
