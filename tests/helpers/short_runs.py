"""One or two short stages of a tiny model, for what can befall a run: signals, full disks, divergence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hypersd_jax.bases import StableDiffusion
from hypersd_jax.config import Config, load_config
from hypersd_jax.stages import adapter_student, context, kinds, opening
from hypersd_jax.training import Step
from hypersd_jax.weights.tensors import open_tensors

RECIPE = """
output_dir: {output}
model: {model}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 4}}
log: {{checkpoint_every: 2, tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
{stages}
"""
ADAPTER = """
  - {name: two, k: 2, solver_steps: 8, updates: 6, batch_size: 4, learning_rate: 1.0e-2, guidance: [2, 4], ema: 0.5}
"""
TWO = f"""{ADAPTER}
  - {{name: one, k: 1, solver_steps: 8, updates: 4, batch_size: 4, learning_rate: 1.0e-2, guidance: [2, 4], ema: 0.5}}
"""
AUTOENCODER = """
  - {name: s, kind: autoencoder, updates: 6, batch_size: 8, learning_rate: 2.0e-3, ema: 0.5}
"""


def recipe(folder: Path, model: Path, *overrides: str, stages: str = ADAPTER) -> Config:
    """The configuration of a run in folder/out, whose file is folder/recipe.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(output=folder / "out", model=model, stages=stages))
    return load_config(path, overrides)


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All of a safetensors file."""
    with open_tensors(path) as file:
        return {key: file.read(key) for key in file.keys()}  # noqa: SIM118


def same_tensors(a: Path, b: Path) -> None:
    """The two files hold the same tensors, bit for bit."""
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def records(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what it says of time."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "input_wait")} for line in lines]


def half_written(output: Path) -> list[Path]:
    """Unfinished files, which should not be left behind."""
    return [path for path in output.rglob("*") if "tmp" in path.name or path.name == ".lock"]


_STEPS: dict[tuple[Any, ...], Step] = {}


def share_steps(patch: pytest.MonkeyPatch) -> None:
    """Runs of one model share their training step, which takes far longer to trace than to run."""
    original = kinds.training_step

    def shared(base: StableDiffusion, mesh: Any) -> Step:
        key = (base.source, base.resolution, json.dumps(dict(base.scheduler_config)), base.dtype)
        if key not in _STEPS:
            _STEPS[key] = original(base, mesh)
        return _STEPS[key]

    for module in (context, opening):
        patch.setattr(module, "training_step", shared)


def sample_cheaply(patch: pytest.MonkeyPatch) -> None:
    """Previews are grey, as grey as the student is large, where a test is not of them."""

    def sampled(run: Any, stage: Any, student: Any) -> np.ndarray:
        size = sum(float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(student))
        return np.full((2, 4, 4, 3), size % 1.0, np.float32)

    patch.setattr(adapter_student, "_sampled", sampled)
