"""A published folder in diffusers: the code of its card runs as it is printed, and makes the images that ours makes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from hypersd_jax import cli
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights import write_lora
from tests.helpers.lora_files import random_adapter
from tests.helpers.lora_images import ANOTHER, TOLERANCE
from tests.helpers.tiny_pipelines import tiny_sd
from tests.helpers.torch_weights import relative_error

RECIPE = """
output_dir: {output}
model: {model}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 4}}
stages:
  - {{name: four, k: 4, solver_steps: 8, updates: 6, batch_size: 4, learning_rate: 1.0e-2}}
  - {{name: unified, kind: dmd, updates: 4, batch_size: 4, learning_rate: 1.0e-2}}
"""
HEADERS = {
    "four": {"sampler": "ddim", "steps": "4", "eta": "0.0", "guidance": "0.0", "timesteps": "[999, 749, 499, 249]"},
    "unified": {"sampler": "tcd", "steps": "2", "eta": "0.0", "guidance": "0.0", "timesteps": "[999, 499]"},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Pipeline]:
    """The published folder, the base in diffusers' layout, and ours with it."""
    root = tmp_path_factory.mktemp("published")
    model, run = tiny_sd(root / "model", attentive=True), root / "run"
    (run / "loras").mkdir(parents=True)
    (run / "config.yaml").write_text(RECIPE.format(output=run, model=model))
    pipe = Pipeline.from_pretrained(model)
    shapes = pipe.base.shapes["unet"]
    for seed, (name, header) in enumerate(HEADERS.items()):
        adapter = {"unet": random_adapter(shapes, seed, scale=0.3)}
        write_lora(run / "loras" / f"{name}.safetensors", adapter, metadata=header)
    cli.main(["publish", str(run), "owner/fast", "--dry-run", "--license=mit", "--images=0"])
    return run / "publish", model, pipe


@pytest.mark.parametrize("name", HEADERS)
def test_the_code_of_the_card(published: tuple[Path, Path, Pipeline], name: str) -> None:
    folder, model, pipe = published
    blocks = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if f'weight_name="{name}.safetensors"' in block]
    code = code.replace('"owner/fast"', repr(str(folder))).replace('"BASE"', repr(str(model)))
    # The same latents as ours, and numbers instead of a picture.
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    given = {"latents": torch.from_numpy(latents).permute(0, 3, 1, 2), "output_type": "np"}
    code = code.replace("    generator=", "    **given,\n    generator=")
    found: dict[str, Any] = {"given": given}
    exec(code, found)
    pipe.load_lora(folder / f"{name}.safetensors", name="it")
    call: dict[str, Any] = {"latents": latents, "output": "np", "stepwise": True, "height": 16, "width": 16}
    ours = pipe("red apple, fluent flat style", **call)[0]
    pipe.set_lora_scale("it", 0.0)
    base = pipe("red apple, fluent flat style", **call)[0]
    assert relative_error(ours, found["image"]) < TOLERANCE
    assert relative_error(base, found["image"]) > ANOTHER
