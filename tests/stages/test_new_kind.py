"""A kind of stage that a user's own script registers: read from a recipe, trained, resumed, exported, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hypersd_jax.weights import open_tensors
from tests.helpers.tiny_model import smaller, tiny_model

ROOT = Path(__file__).parents[2]
RECIPE = """
output_dir: {output}
model: {model}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 4}}
log: {{tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
  - {{name: guided, kind: guidance, updates: 3, batch_size: 4, learning_rate: 1.0e-2, guidance: {guidance}}}
  - {{name: two, k: 2, solver_steps: 4, updates: 1, batch_size: 4, learning_rate: 1.0e-2, teacher: previous}}
"""


def run(recipe: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.stages.scripts.new_kind", str(recipe)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_it_trains_between_the_packages_own(tmp_path: Path) -> None:
    model, output = smaller(tiny_model(tmp_path / "model")), tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(output=output, model=model, guidance=3.0))
    done = run(recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("guided", 1),
        ("guided", 2),
        ("guided", 3),
        ("two", 1),
    ]
    assert all(line["loss"] > 0 and line["skipped"] == 0 for line in lines)
    with open_tensors(output / "loras" / "guided.safetensors") as file:
        assert (file.metadata["steps"], file.metadata["sampler"]) == ("4", "ddim")
    recipe.write_text(RECIPE.format(output=output, model=model, guidance="many"))
    refused = run(recipe)
    assert "stages.0.guidance must be a finite number, not 'many'" in refused.stderr
