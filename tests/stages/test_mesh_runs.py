"""The same run on one device and on eight, with the base and the adapters split over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypersd_jax.weights.tensors import open_tensors
from tests.helpers.tiny_model import tiny_model

ROOT = Path(__file__).parents[2]
RECIPE = """
output_dir: unset
model: {model}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 64}}
log: {{tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
  - {{name: one, k: 2, solver_steps: 8, updates: 2, batch_size: 16, accumulate: 2, learning_rate: 1.0e-3,
      guidance: [2, 4], export: raw}}
"""


def run(folder: Path, recipe: Path, devices: int, data: int, fsdp: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    out = folder / f"{data}x{fsdp}"
    command = [sys.executable, "-m", "tests.stages.scripts.on_devices", str(recipe)]
    done = subprocess.run(
        [*command, str(devices), str(data), str(fsdp), str(out)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with open_tensors(out / "loras" / "one.safetensors") as file:
        factors = {key: file.read(key) for key in file.keys()}  # noqa: SIM118
    return json.loads(done.stdout.strip().splitlines()[-1]), factors


@pytest.mark.devices
def test_eight_devices_train_what_one_does(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_model(tmp_path / "model")))
    alone, expected = run(tmp_path, recipe, 1, 1, 1)
    assert alone["devices"] == 1
    layout, found = run(tmp_path, recipe, 8, 4, 2)
    assert layout["devices"] == 8
    assert "fsdp" in layout["base"]
    assert layout["split"] > 0
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Two Adam updates of 1e-3: rounding is all that may differ, and Adam divides small gradients by small ones.
        np.testing.assert_allclose(found[key], value, atol=1e-4, err_msg=key)
    moved = [key for key in found if "lora_up" in key]
    assert all(np.abs(found[key]).max() > 5e-4 for key in moved)
