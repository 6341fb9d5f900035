"""A run of two real processes, which meet on this machine: the same as one process with all devices."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersd_jax.weights.tensors import open_tensors
from tests.helpers.tiny_model import smaller, tiny_model

ROOT = Path(__file__).parents[2]
RECIPE = """
output_dir: unset
model: {{source: {model}, dtype: float32}}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 4}}
mesh: {{data: 2, fsdp: 2}}
log: {{tensorboard: false, compilation_cache: false, sample_every: 2}}
evaluation: {{samples: 0, batch_size: 4}}
stages:
  - {{name: one, k: 2, solver_steps: 8, updates: 3, batch_size: 8, learning_rate: 1.0e-3, guidance: [2, 4],
      export: raw}}
"""

CONNECTED = re.compile(
    r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+|\s"
)
"""The pieces in which the library prints each meeting of devices; its threads now and then write them in turn."""


def start(recipe: Path, output: Path, devices: int, *overrides: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "hypersd_jax", "train", "--config", str(recipe), f"output_dir={output}"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *overrides], cwd=ROOT, env=environment, **streams)


def together(recipe: Path, output: Path, *overrides: str) -> list[tuple[int, str, str]]:
    """Run two processes of two devices; the exit status and both streams of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = f"distributed.coordinator=localhost:{port}", "distributed.processes=2"
    running = [start(recipe, output, 2, *meet, f"distributed.process={index}", *overrides) for index in range(2)]
    found = []
    for each in running:
        out, err = each.communicate(timeout=300)
        found.append((each.returncode, out, err))
    return found


def factors(output: Path) -> dict[str, np.ndarray]:
    with open_tensors(output / "loras" / "one.safetensors") as file:
        return {key: file.read(key) for key in file.keys()}  # noqa: SIM118


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The output of one process with four devices, of two with two each, and what those printed."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=smaller(tiny_model(folder / "model"))))
    alone = start(recipe, folder / "alone", 4)
    _, err = alone.communicate(timeout=300)
    assert alone.returncode == 0, err[-3000:]
    printed = together(recipe, folder / "together", "stages.*.updates=2")
    assert [status for status, *_ in printed] == [0, 0], printed[1][2][-3000:]
    return recipe, folder / "alone", folder / "together", printed


@pytest.mark.devices
def test_two_processes_train_and_preview(outputs):
    """After two updates: the metrics and the preview of one process; the first one alone says and writes."""
    _, alone, both, printed = outputs
    for mine, theirs in zip(records(both), records(alone), strict=False):
        for name in ("loss", "grad_norm", "param_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)
    assert len(records(both)) == 2
    preview = np.asarray(Image.open(both / "samples" / "one.png"), int)
    during = np.asarray(Image.open(alone / "samples" / "one-000002.png"), int)
    assert np.abs(preview - during).max() <= 1
    assert "LoRA files:" in printed[0][1]
    assert CONNECTED.sub("", printed[1][1]) == ""


@pytest.mark.devices
def test_one_process_goes_on_where_two_stopped(outputs):
    """A checkpoint of two processes is restored by one, on another mesh, and ends as the run that was never stopped."""
    recipe, alone, both, _ = outputs
    later = start(recipe, both, 1, "mesh.data=1", "mesh.fsdp=1")
    _, err = later.communicate(timeout=300)
    assert later.returncode == 0, err[-3000:]
    mine, theirs = factors(both), factors(alone)
    assert mine.keys() == theirs.keys()
    # Adam's first updates are near +-1e-3 whatever the gradient: where that is almost 0, rounding picks the sign.
    difference = np.concatenate([np.abs(mine[key] - value).reshape(-1) for key, value in theirs.items()])
    assert np.quantile(difference, 0.99) < 1e-5
    assert difference.max() < 2e-3


@pytest.mark.devices
def test_two_processes_compare(outputs):
    """Both sample and measure the students and the teacher; the first one writes."""
    recipe, _, both, _ = outputs
    printed = together(recipe, both, "evaluation.samples=3")
    assert [status for status, *_ in printed] == [0, 0], printed[1][2][-3000:]
    assert json.loads((both / "results.json").read_text())[-1]["model"] == "one"
    assert (both / "report.html").exists()
    assert "report:" in printed[0][1]


FEEDBACK = """
  - {name: liked, kind: feedback, times: [999], updates: 2, batch_size: 8, learning_rate: 1.0e-3, guidance: 3,
     feedback: {rewards: [{name: "embedded:reward"}], guards: {every: 1, images: 8}}}
"""
AUTOENCODER = """stages:
  - {name: one, kind: autoencoder, updates: 2, batch_size: 8, learning_rate: 1.0e-3}
"""


@pytest.mark.devices
@pytest.mark.parametrize("kind", ["feedback", "autoencoder"])
def test_two_processes_train_other_kinds(kind, tmp_path):
    """What several processes hold a part of, and one writes: both LoRAs of feedback, and a whole model."""
    text = RECIPE.format(model=tiny_model(tmp_path / "model"))
    before, _ = text.split("stages:")
    (tmp_path / "recipe.yaml").write_text(text + FEEDBACK if kind == "feedback" else before + AUTOENCODER)
    printed = together(tmp_path / "recipe.yaml", tmp_path / "out", "stages.*.updates=2")
    assert [status for status, *_ in printed] == [0, 0], printed[1][2][-3000:]
    names = ["one", "liked", "liked.feedback"] if kind == "feedback" else []
    written = [tmp_path / "out" / "loras" / f"{name}.safetensors" for name in names] or [tmp_path / "out" / "model"]
    assert all(path.exists() for path in written)


@pytest.mark.devices
def test_a_process_that_waits_in_vain_says_so(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tmp_path))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = f"distributed.coordinator=localhost:{free.getsockname()[1]}"
    (tmp_path / "model_index.json").write_text("{}")
    lonely = start(
        recipe,
        tmp_path / "out",
        1,
        meet,
        "distributed.processes=2",
        "distributed.process=1",
        "distributed.timeout_seconds=2",
    )
    _, err = lonely.communicate(timeout=100)
    assert lonely.returncode == 2
    assert "process 1 of 2 did not meet the others in 2 s" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
