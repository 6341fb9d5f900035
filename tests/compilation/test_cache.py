"""Compiled programs last from one process to the next, and a folder for them that does not serve costs time alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from hypersd_jax.compilation import trim
from hypersd_jax.weights.tensors import open_tensors
from tests.helpers.tiny_model import smaller, tiny_model

ROOT = Path(__file__).parents[2]
SCRIPT = """
import collections, json, sys
import jax
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name.rpartition("/")[2]]))
from hypersd_jax.cli import main
for arguments in json.loads(sys.argv[1]):
    main(arguments)
print(json.dumps(seen))
"""
RECIPE = """
model: {model}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 4}}
log: {{tensorboard: false}}
evaluation: {{samples: {samples}, batch_size: 3}}
stages:
  - {{name: timed, {stage}, updates: 2, batch_size: 2, learning_rate: 1.0e-3}}
"""
TSCD = "k: 1, solver_steps: 4"
DMD = "kind: dmd, times: [800], fake_updates: 2"


class Ran(NamedTuple):
    """What a process asked of the folder of compiled programs, and its warnings."""

    asked: int
    found: int
    warnings: str


def run(cache: Path | str, *commands: Sequence[Any], **environment: str) -> Ran:
    """Run commands in a process of their own."""
    settings = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **environment,
    }
    given = json.dumps([[str(part) for part in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", SCRIPT, given], env=settings, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    warned = "\n".join(line for line in done.stderr.splitlines() if "warning" in line.lower())
    return Ran(seen["compile_requests_use_cache"], seen.get("cache_hits", 0), warned)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smaller(tiny_model(tmp_path_factory.mktemp("model")))


def sample(model: Path, output: Path, steps: int = 2, *more: Any) -> list[Any]:
    settings = ["--sampler", "lcm", "--guidance", 3, "--num-images", 2]
    return ["sample", "--model", model, "--prompt", "x", "--steps", steps, *settings, *more, "--output", output]


def programs(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*-cache")}


def same_lora(a: Path, b: Path) -> None:
    """What two runs trained is the same, bit for bit."""
    files = [open_tensors(folder / "loras" / "timed.safetensors") for folder in (a, b)]
    with files[0] as first, files[1] as second:
        assert list(first.keys()) == list(second.keys())
        for key in first.keys():  # noqa: SIM118
            np.testing.assert_array_equal(first.read(key), second.read(key), err_msg=key)


class Filled(NamedTuple):
    """A folder with the programs of a process that sampled."""

    folder: Path
    ran: Ran

    @property
    def cache(self) -> Path:
        return self.folder / "cache"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Filled:
    folder = tmp_path_factory.mktemp("filled")
    return Filled(folder, run(folder / "cache", sample(model, folder / "a.png"), PYTHONHASHSEED="1"))


def test_a_second_process_samples_without_compiling(tmp_path: Path, model: Path, filled: Filled) -> None:
    assert filled.ran.found < filled.ran.asked
    kept = programs(filled.cache)
    assert any(program.startswith("jit_scan-") for program in kept)
    # Another number of steps, seed and guidance are the same programs.
    other = sample(model, tmp_path / "c.png", 3, "--seed", 5, "--guidance", 2)
    second = run(filled.cache, sample(model, tmp_path / "b.png"), other, PYTHONHASHSEED="2")
    assert second.found == second.asked >= 4
    assert programs(filled.cache) == kept
    for index in (0, 1):
        first, again = filled.folder / f"a-{index:03d}.png", tmp_path / f"b-{index:03d}.png"
        assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(("stage", "samples"), [(TSCD, 0), (DMD, 3)], ids=["tscd", "dmd"])
def test_a_second_process_trains_without_compiling(tmp_path: Path, model: Path, stage: str, samples: int) -> None:
    """Of one model alone, and of several with the comparison."""
    cache, recipe = tmp_path / "cache", tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, stage=stage, samples=samples))
    ran = [
        run(cache, ["train", "--config", recipe, f"output_dir={tmp_path / name}"], PYTHONHASHSEED=seed)
        for name, seed in (("a", "1"), ("b", "2"))
    ]
    assert any(program.startswith("jit_step-") for program in programs(cache))
    assert ran[0].found < ran[0].asked
    assert ran[1].found == ran[1].asked >= 4
    same_lora(tmp_path / "a", tmp_path / "b")


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    found = run(file / "cache", sample(model, tmp_path / "a.png", 1))
    assert found.found == 0
    assert found.warnings.count("\n") == 0
    assert f"{file / 'cache'}: new compiled programs cannot be kept here" in found.warnings
    assert len(list(tmp_path.glob("a-*.png"))) == 2


def test_damaged_programs_are_compiled_again_in_silence(tmp_path: Path, model: Path, filled: Filled) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in filled.cache.glob("*-cache"):
        (cache / path.name).write_bytes(path.read_bytes()[:100])
    found = run(cache, sample(model, tmp_path / "b.png"))
    assert (found.found, found.warnings) == (0, "")
    assert (filled.folder / "a-000.png").read_bytes() == (tmp_path / "b-000.png").read_bytes()


def test_the_programs_used_longest_ago_are_deleted(tmp_path: Path) -> None:
    for age in range(4):
        path = tmp_path / f"jit_{age}-cache"
        path.write_bytes(b"0" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "other").write_bytes(b"0" * 1000)
    trim(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jit_0-cache", "jit_1-cache", "other"]
    trim(tmp_path / "missing", 0)
