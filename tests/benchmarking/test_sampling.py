"""``hypersd benchmark sampling``: its rows, its files, and that each API samples the pipeline's images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from hypersd_jax.bases import load_base
from hypersd_jax.benchmarking import APIS, measure
from hypersd_jax.benchmarking.apis import WRAPPERS, Runner
from hypersd_jax.benchmarking.measure import DEVICE, PROCESS, TOLERANCE
from hypersd_jax.benchmarking.phases import make_phases, make_workload
from hypersd_jax.cli import main
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.sampling_command import EMBEDDED_PROMPTS
from hypersd_jax.weights.mesh import make_mesh
from tests.helpers.lora_files import random_adapter
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tiny_xl import tiny_xl

ROOT = Path(__file__).parents[2]
CALL = ["benchmark", "sampling", "--guidance=0"]
PHASES = ("text", "denoise", "decode", "transfer")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_model(root / "sd")
    return tiny_xl(root / "xl").parent


def test_rows_and_files(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "speed"
    options = ["--model", str(models / "sd"), "--steps=1,2", "--batch-sizes=3", "--repeats=2"]
    main([*CALL, *options, "--sampler=tcd", "--size=16x32", "--output", str(output)])
    printed = capsys.readouterr()
    files = [output / f"results.{suffix}" for suffix in ("json", "md", "png")]
    assert printed.out.split() == [str(file) for file in files]
    assert sorted(output.iterdir()) == sorted(files)
    assert "2 steps, batch 3" in printed.err
    assert "compiling (once)" in printed.err

    found = json.loads(files[0].read_text())
    assert found["device"] == f"{jax.device_count()} x cpu, on {os.cpu_count()} cores"
    assert found["made"].startswith("Made ")
    assert found["command"].startswith("hypersd benchmark sampling --guidance=0 --model ")
    assert found["versions"]["jax"] == jax.__version__
    settings = {key: found["settings"][key] for key in ("model", "dtype", "sampler", "height", "width", "repeats")}
    assert settings == {"model": "sd", "dtype": "float32", "sampler": "tcd", "height": 16, "width": 32, "repeats": 2}
    rows = found["rows"]
    assert [(row["batch"], row["steps"], row["api"]) for row in rows] == [
        (3, steps, api) for steps in (1, 2) for api in APIS
    ]
    for row in rows:
        check_row(row)
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"])
    peaks = [row["peak_memory_bytes"] for row in rows]
    assert peaks == sorted(peaks)
    # A batch size's second number of steps compiles its denoising alone, and its row still counts all three.
    assert min(row["compile_seconds"] for row in rows) > 0.01

    page = files[1].read_text()
    assert f"    {found['command']}\n" in page
    assert page.count("\n| ") == 2 + len(rows)
    assert "share the cores" not in page
    assert min(Image.open(files[2]).size) > 400


def check_row(row: dict[str, Any]) -> None:
    assert all(row[f"{phase}_seconds"] > 0 for phase in PHASES)
    assert row["seconds_quartile_1"] <= row["seconds"] <= row["seconds_quartile_3"]
    assert sum(row[f"{phase}_seconds"] for phase in PHASES) == pytest.approx(row["seconds"], rel=0.5)
    assert row["memory_of"] == PROCESS
    assert row["peak_memory_bytes"] > 100 * 2**20 > row["program_bytes"] > 100_000
    assert 0 <= row["largest_distance"] <= row["largest_difference"] < 1e-5


@pytest.mark.parametrize(("model", "how"), [("sd", {"sampler": "tcd"}), ("xl", {"guidance": 4.0, "size": (16, 24)})])
@pytest.mark.parametrize("api", APIS)
def test_each_api_samples_the_pipelines_images(models: Path, model: str, how: dict[str, Any], api: str) -> None:
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    pipe = Pipeline.from_pretrained(models / model, mesh=mesh)
    for name in ("unet", "text_encoder"):
        pipe.add_lora(name, {name: random_adapter(pipe.base.shapes[name], 0)})
    work = make_workload(pipe, steps=2, batch=5, **how)
    base = pipe.base.without_weights() if api == "jit" else load_base(models / model, dtype=pipe.dtype)
    runner = Runner(api, make_phases(base, work.settings), pipe.active(), mesh)
    first, again = runner.run(work), runner.run(work)
    np.testing.assert_array_equal(first.images, again.images)
    assert first.compile_seconds == again.compile_seconds  # of the same programs
    height, width = how.get("size", (None, None))
    prompts = [EMBEDDED_PROMPTS[i % len(EMBEDDED_PROMPTS)] for i in range(5)]
    call = {"steps": 2, "sampler": how.get("sampler"), "guidance": how.get("guidance")}
    expected = pipe(prompts, height=height, width=width, output="np", **call)
    np.testing.assert_allclose(first.images, expected, rtol=0, atol=1e-6)


def test_images_that_differ_end_it(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One API is given a function that decodes another image; nothing is written."""
    wrap = WRAPPERS["shard_map"]

    def wrong(function: Any, axes: Any, mesh: Any) -> Any:
        return wrap((lambda *given: 0.99 * function(*given)) if function.__name__ == "decode" else function, axes, mesh)

    monkeypatch.setitem(WRAPPERS, "shard_map", wrong)
    options = ["--model", str(models / "sd"), "--steps=1", "--repeats=1", "--apis=jit,shard_map"]
    with pytest.raises(SystemExit) as stop:
        main([*CALL, *options, "--output", str(tmp_path / "out")])
    text = str(stop.value.code)  # which Python prints, and ends with status 1
    assert text.startswith("hypersd: jit and shard_map sample different images at 1 steps, batch 8: they lie 0.00")
    assert f"in float32 {TOLERANCE['float32']:g} is tolerated" in text
    assert not (tmp_path / "out").exists()


def test_one_api_is_compared_with_none(tmp_path: Path, models: Path) -> None:
    main([*CALL, "--model", str(models / "sd"), "--steps=1", "--repeats=1", "--apis=jit", "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["api"], row["largest_difference"], row["largest_distance"]) == ("jit", None, None)


def test_memory_is_the_devices_where_they_count_it() -> None:
    class Device:
        def __init__(self, stats: Any) -> None:
            self.stats = stats

        def memory_stats(self) -> Any:
            return self.stats

    counting: Any = [Device({"peak_bytes_in_use": peak}) for peak in (5, 9, 7)]
    assert measure.peak_memory(counting) == (9, DEVICE)
    for other in (None, {}, {"bytes_in_use": 3}):
        assert measure.peak_memory([*counting, Device(other)] if other else [Device(other)])[1] == PROCESS  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--size=15x16", "height=15 must be a positive multiple of 2"),
        ("--guidance=-1", "guidance=-1 is negative"),
    ],
)
def test_what_the_model_does_not_take(
    tmp_path: Path, models: Path, option: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*CALL, "--model", str(models / "sd"), option, "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"hypersd: {words}"


@pytest.mark.devices
def test_on_eight_devices(tmp_path: Path, models: Path) -> None:
    """The default batch size, 8, is one image on each; 12 cannot be split, and are refused. No program is kept."""
    kept = tmp_path / "kept"
    programs = {"JAX_COMPILATION_CACHE_DIR": str(kept), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hypersd_jax", *CALL, "--model", str(models / "sd"), "--steps=2", *options],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", **programs},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run("--repeats=1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not kept.exists() or not list(kept.iterdir())
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["device"].startswith("8 x cpu")
    assert found["command"].startswith("JAX_NUM_CPU_DEVICES=8 hypersd benchmark sampling ")
    assert [(row["api"], row["batch"]) for row in found["rows"]] == [(api, 8) for api in APIS]
    for row in found["rows"]:
        check_row(row)
    assert "* These devices share the cores of one CPU." in (tmp_path / "results.md").read_text()

    done = run("--batch-sizes=8,12", "--output", str(tmp_path / "other"))
    assert done.returncode == 2
    line = "hypersd: --batch-sizes 12: cannot be split evenly over 8 devices; take a multiple of 8\n"
    assert done.stderr == line
    assert not (tmp_path / "other").exists()
