"""What a style LoRA and a few-step LoRA keep together: the quotients, and the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersd_jax.cli import main
from hypersd_jax.evaluation.generator import Item
from hypersd_jax.evaluation.samples import Samples
from hypersd_jax.evaluation.stacking import best, ratio, retention
from hypersd_jax.models import UNetConfig, unet
from hypersd_jax.weights.lora import write_lora
from tests.helpers.lora_files import random_adapter

N, WIDTH = 32, 1280
ITEMS = tuple(Item(f"prompt {i}", i) for i in range(N))


def samples(features: np.ndarray) -> Samples:
    return Samples(items=ITEMS, images=np.zeros((N, 2, 2, 3), np.uint8), features=features, seen=features)


@pytest.fixture(scope="module")
def parts() -> dict[str, np.ndarray]:
    """Features of the base and of the few-step LoRA, and a style's direction, of length 2."""
    random = np.random.default_rng(0)
    base = random.standard_normal((N, WIDTH))
    direction = random.standard_normal(WIDTH)
    error = random.standard_normal((N, WIDTH)) * 0.01
    return {"base": base, "fast": base + error, "style": 2 * direction / np.linalg.norm(direction), "error": error}


def kept(parts: dict[str, np.ndarray], share: float, error: float = 1.0) -> Any:
    """With so much of the style, and so much of the few-step LoRA's error."""
    both = parts["base"] + error * parts["error"] + share * parts["style"]
    given = (parts["base"], parts["base"] + parts["style"], parts["fast"], both)
    return retention(*map(samples, given), scorer=None)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0, 1.3])
def test_the_share_of_a_style(parts: dict[str, np.ndarray], share: float) -> None:
    found = kept(parts, share)
    assert found.style.mean == pytest.approx(share, abs=1e-9)
    assert found.match is None
    assert found.quality == found.nearness
    assert found.least == pytest.approx(min(share, found.nearness.mean, 1.0))


def test_the_quality_is_the_nearness_to_many_steps(parts: dict[str, np.ndarray]) -> None:
    assert kept(parts, 1.0).nearness.mean == pytest.approx(1.0)
    assert kept(parts, 1.0, error=4.0).nearness.mean == pytest.approx(0.25)


def test_noise_is_no_style(parts: dict[str, np.ndarray]) -> None:
    """One half's direction says nothing of the other half where there is none; measured on itself it would be 1."""
    random = np.random.default_rng(1)
    noise = random.standard_normal((N, WIDTH))
    both = parts["fast"] + noise
    styled = parts["base"] + 0.2 * parts["style"] + noise
    found = retention(*map(samples, (parts["base"], styled, parts["fast"], both)), scorer=None)
    along = noise @ parts["style"] / np.linalg.norm(parts["style"])
    assert abs(found.style.mean) < 3 * found.style.standard_error + abs(along.mean())


def test_the_jackknife_is_the_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(0).standard_normal(16) + 3
    found = ratio(np.stack([values, np.ones(16)]))
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std(ddof=1) / 4)
    product = ratio(np.stack([values, np.full(16, 2.0), np.full(16, 3.0), np.ones(16)]), pairs=2)
    assert product.mean == pytest.approx(1.5 * values.mean())


def test_the_best_scales_are_the_lowest_of_equal_ones() -> None:
    rows = [
        {"least": least, "style_scale": scale, "fast_scale": fast}
        for least, scale, fast in ((0.8, 0.8, 1.0), (0.95, 1.2, 1.0), (0.95, 1.0, 1.0), (0.95, 1.0, 0.9))
    ]
    assert best(rows) is rows[3]


def test_the_command(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "unet" / "config.json").read_text())
    shapes = unet(UNetConfig.from_dict(config)).shapes
    header = {"sampler": "ddim", "steps": "2", "guidance": "0.0", "eta": "0.0"}
    for seed, (name, metadata) in enumerate((("fast", header), ("style", {}))):
        write_lora(tmp_path / f"{name}.safetensors", {"unet": random_adapter(shapes, seed)}, metadata=metadata)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\na lion\na blue cat\na boat\n")
    output = tmp_path / "out"
    arguments = [str(tmp_path / "fast.safetensors"), f"{tmp_path / 'style.safetensors'}@0.5", "--model", str(model)]
    arguments += ["--prompts-file", str(prompts), "--steps", "1,2", "--scales", "0,1", "--guidance", "1"]
    main(["stack", *arguments, "--output", str(output)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[2:] == [str(output / name) for name in ("results.json", "README.md", "grid.png")]
    assert printed[0].startswith("1 step: few-step LoRA at 1, style at ")
    rows = json.loads((output / "results.json").read_text())
    assert [(row["steps"], row["style_scale"]) for row in rows] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [sum(row["best"] for row in rows if row["steps"] == steps) for steps in (1, 2)] == [1, 1]
    for row in rows:
        assert np.isfinite(row["match"])  # the scorer knows the prompts' words
        assert row["style"] == (pytest.approx(0, abs=1e-9) if row["style_scale"] == 0 else row["style"])
        assert row["nearness"] > 0
    assert "| 1 | 1 | 0 | 0% ± 0% | " in (output / "README.md").read_text().replace("**", "")
    with Image.open(output / "grid.png") as grid:
        assert grid.size[0] > 6 * 128
