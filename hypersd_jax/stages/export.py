"""The student as a LoRA file that says in its header how to sample with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_jax.adapters import Adapter
from hypersd_jax.config import ConsistencyStage
from hypersd_jax.diffusion import solver_table
from hypersd_jax.weights.components import Components
from hypersd_jax.weights.lora import write_lora


def sampling_header(stage: ConsistencyStage, scheduler_config: dict[str, Any]) -> dict[str, str]:
    """How the stage's student samples: k steps of its sampler on the grid it was trained on, without guidance."""
    config = {**scheduler_config, "original_inference_steps": stage.solver_steps}
    table = solver_table(stage.sampler, stage.k, eta=stage.eta, scheduler_config=config)
    return {
        "steps": str(stage.k),
        "sampler": stage.sampler,
        "timesteps": json.dumps([int(t) for t in table["timesteps"]]),
        "eta": str(stage.eta),
        "guidance": "0.0",
        "original_inference_steps": str(stage.solver_steps),
    }


def export_student(
    path: Path, adapter: Adapter, stage: ConsistencyStage, components: Components, *, base_fingerprint: str
) -> dict[str, str]:
    """Write the student in kohya layout, atomically; returns the header's sampling settings."""
    for unfinished in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed while it wrote
        unfinished.unlink()
    header = sampling_header(stage, dict(components.scheduler_config))
    metadata = {
        **header,
        "base_fingerprint": base_fingerprint,
        "ss_base_model_version": _kohya_family(components),
        "ss_training_comment": f"hypersd_jax {stage.kind} k={stage.k}",
    }
    write_lora(path, {"unet": adapter}, layout="kohya", metadata=metadata, dtype=np.float32)
    return header


def _kohya_family(components: Components) -> str:
    """Kohya's name of the base's family, which A1111 sorts LoRAs by; SD 2.x is told by OpenCLIP-H's width."""
    if components.is_xl:
        return "sdxl_base_v1-0"
    return "sd_v2" if components.unet_config.cross_attention_dims[0] == 1024 else "sd_v1"
