"""``hypersd inspect`` of models, images and runs, and of what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from hypersd_jax import cli
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.conversion import convert_model
from tests.helpers.tiny_model import tiny_model


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    cli.main(["inspect", str(path)])
    told = capsys.readouterr().out
    assert told.startswith(f"{path}: ")
    cli.main(["inspect", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(path)
    if found.get("call"):
        assert f"  try         {found['call']}\n" in told
        assert callable(cli._parser().parse_args(shlex.split(found["call"])[1:]).run)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_model_in_both_forms(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = inspected(model, capsys)
    assert (folder["what"], folder["form"], folder["family"]) == ("model", "diffusers folder", "sd1")
    assert folder["parameters"].keys() == {"unet", "vae", "text_encoder"}
    assert folder["pixels"] == [16, 16]
    with pytest.warns(UserWarning, match="only this package reads these"):
        convert_model(model, tmp_path / "one.safetensors", "single-file")
    single = inspected(tmp_path / "one.safetensors", capsys)
    assert single["form"] == "single file"
    same = ("family", "parameters", "pixels", "prediction_type", "scheduler")
    assert {key: single[key] for key in same} == {key: folder[key] for key in same}
    assert single["metadata"]["modelspec.title"] == "tiny"
    part = inspected(model / "vae", capsys)
    assert (part["what"], part["class"]) == ("component", "AutoencoderKL")
    assert part["parameters"] == folder["parameters"]["vae"]


def test_an_image_of_ours_can_be_sampled_again(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that the report tells makes the same image."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "tiny")
    image = tmp_path / "a.png"
    call = ["--steps=3", "--sampler=ddim", "--eta=0.5", "--guidance=3", "--seed=7", "--negative-prompt=blue, dark"]
    cli.main(["sample", "--model=tiny", '--prompt=a "cat": red, fluent', *call, "--output", str(image)])
    capsys.readouterr()
    found = inspected(image, capsys)
    assert (found["prompt"], found["negative"]) == ('a "cat": red, fluent', "blue, dark")
    assert found["settings"]["Model"] == "tiny"
    cli.main([*shlex.split(found["call"])[1:], "--output=again.png"])
    first, again = (np.asarray(Image.open(path)) for path in (image, "again.png"))
    np.testing.assert_array_equal(first, again)
    assert found["alone"]
    cli.main([*shlex.split(found["call"])[1:], "--prompt=another", "--output=two.png"])
    capsys.readouterr()
    assert not inspected(tmp_path / "two-001.png", capsys)["alone"]


def test_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = Image.new("RGB", (8, 4))
    picture.save(tmp_path / "plain.jpg")
    found = inspected(tmp_path / "plain.jpg", capsys)
    assert (found["format"], found["size"], found["call"]) == ("JPEG", [8, 4], None)
    info = PngInfo()
    info.add_text("prompt", json.dumps({"1": {"class_type": "KSampler"}, "2": {"class_type": "KSampler"}}))
    picture.save(tmp_path / "comfy.png", pnginfo=info)
    assert inspected(tmp_path / "comfy.png", capsys)["comfyui_nodes"] == {"KSampler": 2}
    settings = "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 5, Size: 512x768"
    text = f"--a cat <lora:style:0.5>\nNegative prompt: bad\n{settings}"
    info = PngInfo()
    info.add_text("parameters", text)
    picture.save(tmp_path / "a1111.png", pnginfo=info)
    found = inspected(tmp_path / "a1111.png", capsys)
    options = cli._parser().parse_args(shlex.split(found["call"])[1:])
    assert (options.sampler, options.steps, options.width, options.height) == ("dpmpp_2m", 20, 512, 768)
    assert options.prompt == ["--a cat"]
    assert (options.lora, options.seed, options.guidance, options.model) == (["style@0.5"], 5, 7.0, "MODEL")


def test_a_run_and_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "loras").mkdir(parents=True)
    stage = "{name: four, k: 4, updates: 100, batch_size: 4, learning_rate: 1.0e-3, solver_steps: 40}"
    recipe = f"output_dir: run\nmodel: embedded\nstages:\n  - {stage}\n"
    (run / "config.yaml").write_text(recipe)
    found = inspected(run, capsys)
    assert found["stages"][0]["student"] is None
    assert found["call"] is None
    shutil.copy(assets() / "loras" / "tscd-4.safetensors", run / "loras" / "four.safetensors")
    (run / "results.json").write_text('[{"model": "four"}]')
    for step in (50, 100):
        (run / "checkpoints" / "four" / str(step)).mkdir(parents=True)
        (run / "checkpoints" / "four" / str(step) / "_CHECKPOINT_METADATA").write_text("{}")
    found = inspected(run, capsys)
    assert found["stages"][0]["updates_done"] == 100
    assert found["stages"][0]["student"] == str(run / "loras" / "four.safetensors")
    assert found["results"] == 1


class Bomb:
    """A pickle that would leave a mark where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["inspect", str(path)])
        printed = capsys.readouterr()
        assert (stop.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
        return printed.err

    mark = tmp_path / "mark"
    for name in ("a.ckpt", "b.safetensors", "c.png"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
    assert "pickled weights are not read" in refusal(tmp_path / "a.ckpt")
    assert "pickled weights are not read" in refusal(tmp_path / "b.safetensors")
    assert "c.png: cannot be read as an image" in refusal(tmp_path / "c.png")
    assert not mark.exists()
    whole = (assets() / "loras" / "tscd-4.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "short.safetensors: is truncated" in refusal(tmp_path / "short.safetensors")
    save_file({"a.weight": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    assert "other.safetensors: not a single-file model" in refusal(tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    assert "neither a model, a LoRA, a run's output nor checkpoints" in refusal(tmp_path / "empty")
