"""Runs that start from a LoRA file: what they start with, what is refused, and that its content is their history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypersd_jax import adapters
from hypersd_jax.config import Config, load_config
from hypersd_jax.errors import UserError
from hypersd_jax.stages import train
from hypersd_jax.stages.kinds import kind_of
from hypersd_jax.stages.opening import open_run
from hypersd_jax.stages.run import check_stages
from hypersd_jax.training.output import open_output
from hypersd_jax.training.reuse import history
from hypersd_jax.weights import write_lora
from hypersd_jax.weights.lora import read_lora
from tests.helpers.lora_files import TEXT_TARGETS, random_adapter
from tests.helpers.short_runs import records, sample_cheaply, share_steps

TARGETS = {"unet": adapters.TARGETS_14, "text_encoder": TEXT_TARGETS}
RECIPE = """
output_dir: {output}
model: {model}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 4, start: "{start}"}}
log: {{tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
  - {{name: liked, kind: feedback, updates: 2, batch_size: 4, learning_rate: 1.0e-2, rank: 2, guidance: 1.0,
     ema: 0.0, anchor: null, feedback: {{rewards: [{{name: "embedded:reward", margin: 90.0}}], guards: null}}}}
"""


def config_of(folder: Path, model: Path, start: Path, *overrides: str) -> Config:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(output=folder / "out", model=model, start=start), encoding="utf-8")
    return load_config(path, overrides)


def open_config(config: Config) -> Any:
    return open_run(config, open_output(config))


@pytest.fixture(scope="module")
def shapes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shapes")
    return dict(open_config(config_of(folder, model, folder, "lora.start=null", TSCD)).base.shapes)


TSCD = "stages=[{name: s, k: 2, solver_steps: 8, updates: 1, batch_size: 4}]"


@pytest.fixture(scope="module")
def start(shapes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of some modules only, at another rank."""
    whole = random_adapter(shapes["unet"], 1, rank=3)
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    write_lora(path, {"unet": {name: entry for name, entry in whole.items() if "down_blocks" in name}})
    return path


def test_it_starts_with_the_file_and_with_fresh_modules_elsewhere(
    tmp_path: Path, model: Path, start: Path, shapes: dict[str, Any]
) -> None:
    run = open_config(config_of(tmp_path, model, start))
    check_stages(run)
    file = read_lora(start, shapes).adapters["unet"]
    found = adapters.join(run.student, run.scales)
    assert found.keys() == run.fresh_scales.keys()
    for path, entry in found.items():
        wanted = file.get(path)
        if wanted is None:
            assert entry["down"].shape[-1] == 4
            assert not np.any(entry["up"])
            continue
        for name in ("down", "up", "scale"):
            np.testing.assert_array_equal(entry[name], wanted[name])


def test_feedback_on_a_file_is_exported_with_it(
    tmp_path: Path, model: Path, start: Path, shapes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    share_steps(monkeypatch)
    sample_cheaply(monkeypatch)
    output = train(config_of(tmp_path, model, start))
    assert [line["step"] for line in records(output)] == [1, 2]
    both = read_lora(output / "loras" / "liked.safetensors", shapes).adapters["unet"]
    second = read_lora(output / "loras" / "liked.feedback.safetensors", shapes).adapters["unet"]
    first = read_lora(start, shapes).adapters["unet"]
    assert any(np.abs(entry["up"]).max() > 0 for entry in second.values())
    for path, entry in both.items():
        wanted = _delta(second[path]) + (_delta(first[path]) if path in first else 0.0)
        np.testing.assert_allclose(_delta(entry), wanted, rtol=1e-4, atol=1e-6)


def _delta(entry: Any) -> np.ndarray:
    down, up, scale = (np.asarray(entry[name], np.float64) for name in ("down", "up", "scale"))
    return down * scale @ up


def test_another_file_is_another_history(tmp_path: Path, model: Path, start: Path, shapes: dict[str, Any]) -> None:
    def found(start: Path) -> str:
        run = open_config(config_of(tmp_path, model, start))
        return history(run.config, 1, "base", run.start_fingerprint)

    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(start.read_bytes())
    assert found(copy) == found(start)
    write_lora(copy, {"unet": random_adapter(shapes["unet"], 2, rank=3)})
    assert found(copy) != found(start)
    without = config_of(tmp_path, model, copy, "lora.start=null")
    assert history(without, 1, "base") not in (found(copy), found(start))


def test_the_first_stage_may_have_it_as_its_teacher(tmp_path: Path, model: Path, start: Path) -> None:
    stage = "stages=[{name: s, k: 2, solver_steps: 8, updates: 1, batch_size: 4, teacher: previous}]"
    run = open_config(config_of(tmp_path, model, start, stage))
    check_stages(run)
    (settings,) = run.config.adapter_stages
    assert kind_of(settings).frozen(run, settings).teacher.keys() == run.scales.keys()
    run = open_config(config_of(tmp_path, model, start, stage, "lora.start=null"))
    assert kind_of(settings).frozen(run, settings).teacher == {}


def test_what_is_no_start_is_refused(tmp_path: Path, model: Path, shapes: dict[str, Any]) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as raised:
            open_config(config_of(tmp_path, model, path))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert refusal(tmp_path / "nowhere.safetensors").startswith("lora.start: ")
    assert "nowhere.safetensors" in refusal(tmp_path / "nowhere.safetensors")
    texts = tmp_path / "texts.safetensors"
    both = {name: random_adapter(shapes[name], 3, rank=2, targets=TARGETS[name]) for name in TARGETS}
    write_lora(texts, both)
    assert "only plain LoRAs on the unet are" in refusal(texts)
