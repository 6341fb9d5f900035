"""Full runs of a tiny model: every stage, exports that sample themselves, resuming, and being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hypersd_jax.config import Config, load_config
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import train
from hypersd_jax.training import Checkpointer
from hypersd_jax.weights.tensors import open_tensors
from tests.helpers.short_runs import share_steps

ROOT = Path(__file__).parents[2]
RECIPE = """
output_dir: {output}
model: {model}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 4}}
log: {{checkpoint_every: 2, tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
  - {{name: two, k: 2, solver_steps: 8, updates: 5, batch_size: 4, learning_rate: 1.0e-2, guidance: [2, 4], ema: 0.5}}
  - {{name: one, k: 1, solver_steps: 4, updates: 4, batch_size: 4, learning_rate: 1.0e-2, guidance: [2, 4], ema: 0.5,
      teacher: {teacher}, sampler: tcd, eta: 0.5, export: raw}}
"""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        yield


def recipe(folder: Path, model: Path, *overrides: str, teacher: str = "base") -> Config:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(output=folder / "out", model=model, teacher=teacher))
    return load_config(path, overrides)


def tensors(path: Path) -> dict[str, np.ndarray]:
    with open_tensors(path) as file:
        return {key: file.read(key) for key in file.keys()}  # noqa: SIM118


def assert_same_loras(a: Path, b: Path) -> None:
    for name in ("two", "one"):
        first, second = (tensors(folder / "loras" / f"{name}.safetensors") for folder in (a, b))
        assert first.keys() == second.keys()
        for key in first:
            np.testing.assert_array_equal(first[key], second[key], err_msg=key)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return train(recipe(tmp_path_factory.mktemp("finished"), model))


def test_what_a_run_leaves(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        *[("two", step) for step in range(1, 6)],
        *[("one", step) for step in range(1, 5)],
    ]
    for line in lines:
        assert {"loss", "grad_norm", "update_norm", "lr", "skipped", "seconds"} <= line.keys()
        assert line["skipped"] == 0
        assert line["loss"] > 0
    for name in ("two", "one"):
        assert (finished / "samples" / f"{name}.png").is_file()
        assert (finished / "checkpoints" / name).is_dir()
    assert load_config(finished / "config.yaml").stages[1].sampler == "tcd"
    # Weights, two moments and the average, and nothing of the base.
    with Checkpointer(finished / "checkpoints" / "one") as checkpoints:
        _, leaves = checkpoints._read_metadata(4)
    factors = {key: array for key, array in tensors(finished / "loras" / "one.safetensors").items() if "lora_" in key}
    saved = sum(int(np.prod(leaf.shape)) for leaf in leaves.values() if leaf.shape)
    assert saved == 4 * sum(array.size for key, array in factors.items() if not key.endswith("alpha"))


def test_the_exported_file_says_how_to_sample_and_does(finished: Path, model: Path) -> None:
    with open_tensors(finished / "loras" / "one.safetensors") as file:
        header = file.metadata
    assert header["steps"] == "1"
    assert header["sampler"] == "tcd"
    assert json.loads(header["timesteps"]) == [999]
    assert header["eta"] == "0.5"
    assert header["guidance"] == "0.0"
    assert header["original_inference_steps"] == "4"
    assert len(header["base_fingerprint"]) >= 16
    pipe = Pipeline.from_pretrained(model)
    report = pipe.load_lora(finished / "loras" / "one.safetensors")
    assert report.layout == "kohya"
    plan = pipe.settings()
    assert (plan.steps, plan.sampler, plan.original_inference_steps) == (1, "tcd", 4)
    assert len(pipe("red apple")) == 1
    workflow = json.loads((finished / "loras" / "one.comfyui.json").read_text())
    assert "one.safetensors" in [node["inputs"].get("lora_name") for node in workflow.values()]
    assert "<lora:one:1>\nSteps: 1, " in (finished / "loras" / "one.a1111.txt").read_text()
    alphas = {key: value for key, value in tensors(finished / "loras" / "one.safetensors").items() if "alpha" in key}
    assert alphas
    assert all(value.shape == () and value == 4 for value in alphas.values())


def test_stages_of_one_kind_share_a_program_and_a_rerun_trains_nothing(
    finished: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (finished / "metrics.jsonl").read_text()
    stamp = (finished / "loras" / "one.safetensors").stat().st_mtime_ns
    train(load_config(finished / "config.yaml"))
    assert (finished / "metrics.jsonl").read_text() == before
    assert (finished / "loras" / "one.safetensors").stat().st_mtime_ns == stamp


def test_another_configuration_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match=r"another configuration, stages\.0\.learning_rate \(0\.01 against 0\.02\)"):
        train(load_config(finished / "config.yaml", ["stages.0.learning_rate=0.02"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.one.batch_size=3", "stages.one.accumulate=2"], r"stages\.one\.batch_size=3"),
        (["stages.one.solver_steps=48"], r"stages\.one\.solver_steps: N = 48 must divide"),
        (["stages.one.sampler=lcm"], r"stages\.one\..*eta"),
        (["model=/nowhere"], "/nowhere"),
    ],
)
def test_what_a_later_stage_would_stumble_over_is_refused_before_anything_is_written(
    tmp_path: Path, model: Path, overrides: list[str], words: str
) -> None:
    config = recipe(tmp_path, model, *overrides)
    with pytest.raises(UserError, match=words):
        train(config)
    assert not Path(config.output_dir).exists()


def test_accumulated_micro_batches_are_the_big_batch(tmp_path: Path, model: Path, finished: Path) -> None:
    """The same images, timesteps, noise and guidance, so the same losses but for rounding."""
    out = train(recipe(tmp_path, model, "stages.two.accumulate=2", "stages.two.updates=2", "stages.one.updates=1"))
    read = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()][:2] for f in (finished, out)]
    for whole, pieces in zip(*read, strict=True):
        assert pieces["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert pieces["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_the_previous_student_as_teacher(tmp_path: Path, model: Path, finished: Path) -> None:
    """The other reading: stage one is the same, the second stage learns something else."""
    out = train(recipe(tmp_path, model, "log.sample_every=2", teacher="previous"))
    first, second = (tensors(folder / "loras" / "two.safetensors") for folder in (finished, out))
    assert all(np.array_equal(first[key], second[key]) for key in first)
    first, second = (tensors(folder / "loras" / "one.safetensors") for folder in (finished, out))
    assert any(not np.array_equal(first[key], second[key]) for key in first)
    assert (out / "samples" / "two-000002.png").is_file()


def run_and_kill(folder: Path, lines: int, *overrides: str) -> None:
    """Run the recipe in a process of its own and SIGKILL it once so many updates are logged."""
    log = folder / "out" / "metrics.jsonl"
    command = [sys.executable, "train.py", "--config", str(folder / "recipe.yaml"), *overrides]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "out" / "loras" / "one.safetensors").exists()


def test_killed_and_gone_on(tmp_path: Path, model: Path, finished: Path) -> None:
    """SIGKILL in the middle; the same command resumes to bit-identical adapters."""
    config = recipe(tmp_path, model)
    run_and_kill(tmp_path, 3)
    train(config)
    assert_same_loras(tmp_path / "out", finished)


def test_killed_in_the_second_stage(tmp_path: Path, model: Path) -> None:
    """The second stage resumes, from its own step, with the first stage's student as its teacher."""
    # Saving takes longer than all else here, so it is rarer than in the recipe; step 8 is saved when 18 are logged.
    often = "log.checkpoint_every=8"
    overrides = (often, "stages.two.updates=2", "stages.one.updates=60", "stages.one.teacher=previous")
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    config = recipe(tmp_path / "killed", model, *overrides)
    run_and_kill(tmp_path / "killed", 2 + 18, *overrides)
    stamp = (tmp_path / "killed" / "out" / "loras" / "two.safetensors").stat().st_mtime_ns
    train(config)
    assert (tmp_path / "killed" / "out" / "loras" / "two.safetensors").stat().st_mtime_ns == stamp
    whole = train(recipe(tmp_path / "whole", model, *overrides))
    assert_same_loras(tmp_path / "killed" / "out", whole)
