"""``--mesh``: what it may be, and the images of eight devices, which are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd_jax import compilation
from hypersd_jax.cli import main
from tests.helpers.tiny_model import tiny_model

ROOT = Path(__file__).parents[2]
PROMPTS = ["--prompt=red apple, fluent flat style", "--prompt=a cat face", "--prompt=lion, blob style"]


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "use_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny-model")


@pytest.mark.parametrize(
    "command", [["sample", "--output=x.png"], ["evaluate", "--output=x"]], ids=["sample", "evaluate"]
)
@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("8", "argument --mesh: must be auto or DATAxFSDP, such as 8x1, not '8'"),
        ("all", "argument --mesh: must be auto or DATAxFSDP, such as 8x1, not 'all'"),
        ("0x1", "argument --mesh: must be auto or DATAxFSDP, such as 8x1, not '0x1'"),
        ("-1x1", "argument --mesh: must be auto or DATAxFSDP, such as 8x1, not '-1x1'"),
        ("2x", "argument --mesh: must be auto or DATAxFSDP, such as 8x1, not '2x'"),
        ("2x2x2", "argument --mesh: must be auto or DATAxFSDP, such as 8x1, not '2x2x2'"),
        ("999x8", "--mesh 999x8: takes 7992 devices, and there are "),
    ],
)
def test_what_does_not_fit_is_one_line(
    command: list[str], value: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [part.replace("=x", f"={tmp_path}/x") for part in command]
    with pytest.raises(SystemExit) as stop:
        main([*options, f"--mesh={value}"])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert line in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.devices
@pytest.mark.parametrize(("mesh", "shape"), [("8x1", "8x1"), ("auto", "1x8"), ("3x2", "3x2")])
def test_eight_devices_sample_what_one_does(tmp_path: Path, model: Path, mesh: str, shape: str) -> None:
    call = ["sample", "--model", str(model), *PROMPTS, "--num-images=2", "--steps=2", "--guidance=3"]
    main([*call, "--output", str(tmp_path / "one.png")])
    done = subprocess.run(
        [sys.executable, "-m", "hypersd_jax", *call, f"--mesh={mesh}", "--output", str(tmp_path / "eight.png")],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f", 16x16, mesh {shape}, 6 images in " in done.stderr
    one, eight = (sorted(tmp_path.glob(f"{name}-*.png")) for name in ("one", "eight"))
    assert [str(path) for path in eight] == done.stdout.split()
    for mine, theirs in zip(one, eight, strict=True):
        before, after = (np.asarray(Image.open(path), int) for path in (mine, theirs))
        assert np.abs(before - after).max() <= 1  # where a value lies between two levels, rounding picks one
