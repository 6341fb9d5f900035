"""The command line: images that appear, one line for what is wrong, and the exit status."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd_jax import compilation
from hypersd_jax.cli import _parser, main
from hypersd_jax.sampling_command import _embedded_lora
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.tensors import open_tensors


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests compile what they run, and leave the user's folder of compiled programs alone."""
    monkeypatch.setattr(compilation, "use_compilation_cache", lambda: None)


def status(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_several_images_with_their_prompts_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple, fluent flat style\n\nlion, blob style\n")
    output = tmp_path / "out" / "image.png"
    arguments = ["sample", "--prompts-file", str(prompts), "--num-images", "2", "--steps", "1", "--seed", "4"]
    assert status(*arguments, "--output", str(output)) == 0
    printed = capsys.readouterr()
    paths = [tmp_path / "out" / f"image-{i:03d}.png" for i in range(4)]
    assert printed.out.split() == [str(path) for path in paths]
    assert "kohya LoRA" in printed.err  # the shipped one-step student
    images = [Image.open(path) for path in paths]
    assert [image.size for image in images] == [(64, 64)] * 4
    assert [image.text["parameters"].split(" <lora:")[0] for image in images] == [
        *["red apple, fluent flat style"] * 2,
        *["lion, blob style"] * 2,
    ]
    assert np.abs(np.asarray(images[0], int) - np.asarray(images[1], int)).max() > 30
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [path.name for path in paths]


def test_the_unified_student_ships_and_is_the_one_step_default() -> None:
    with open_tensors(assets() / "loras" / "unified.safetensors") as file:
        assert (file.metadata["steps"], file.metadata["timesteps"], file.metadata["sampler"]) == ("1", "[999]", "tcd")
    options = _parser().parse_args(["sample", "--steps", "1", "--prompt", "x"])
    assert [path.stem for path, _ in _embedded_lora(options)] == ["unified"]
    options = _parser().parse_args(["sample", "--timesteps", "999", "--prompt", "x"])
    assert [path.stem for path, _ in _embedded_lora(options)] == ["tscd-1"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("", "tscd-4"),
        *((f"--steps {steps}", "unified") for steps in (1, 2, 3, 5, 6, 7)),
        ("--steps 4", "tscd-4"),
        ("--steps 8", "tscd-8"),
        ("--steps 3 --guidance 1", "unified"),
        ("--timesteps 999,600,300", "unified"),
        ("--timesteps 999,499", "tscd-2"),
        ("--steps 9", None),
        ("--steps 4 --guidance 1.5", None),
        ("--steps 4 --guidance 1.5 --guidance-steps 1", "tscd-4"),
        ("--steps 2 --guidance 1.5 --base-steps 1", "unified"),
        ("--steps 4 --preset hyper-sd15-4steps", None),
        ("--steps 4 --model elsewhere", None),
    ],
)
def test_the_best_shipped_lora_for_every_number_of_steps(arguments: str, name: str | None) -> None:
    found = _embedded_lora(_parser().parse_args(["sample", *arguments.split(), "--prompt", "x"]))
    assert [path.stem for path, _ in found] == ([] if name is None else [name])
    assert all(path.is_file() for path, _ in found)


def test_six_steps_of_the_embedded_model_are_a_students(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "6", "--seed", "3", "--num-images", "4"]  # as many as above, whose program it then is
    output = tmp_path / "out.png"
    assert status("sample", *arguments, "--prompt", "lion, noto style", "--output", str(output)) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [str(tmp_path / f"out-{i:03d}.png") for i in range(4)]
    (line,) = (line for line in printed.err.splitlines() if line.startswith("sampled with "))
    said = r"model embedded, LoRA unified@1, tcd, 6 steps, guidance 0, eta 0, seed 3, 64x64, 4 images in \d+\.\d s"
    assert re.fullmatch(f"sampled with {said}", line)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_ships_for_each_step_count(steps: int) -> None:
    with open_tensors(assets() / "loras" / f"tscd-{steps}.safetensors") as file:
        assert file.metadata["steps"] == str(steps)
        assert file.metadata["guidance"] == "0.0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "--stepps", "4"], "unrecognized arguments: --stepps"),
        (["sample", "--steps", "few"], "invalid int value"),
        (["sample", "--model", "nowhere", "--prompt", "x"], "nowhere: no such file or folder"),
        (["sample", "--lora", "x.safetensors@much"], "the scale 'much' is not a number"),
        (["sample", "--lora", "nothing.safetensors"], "nothing.safetensors"),
        (["sample", "--timesteps", "999,x"], "--timesteps 999,x"),
        (["sample", "--latents", "nothing.npy"], "--latents nothing.npy"),
        (["sample", "--output", "image.txt"], "--output image.txt"),
        (["sample", "--prompts-file", "nothing.txt"], "--prompts-file nothing.txt"),
        (["train", "--config", "nothing.yaml"], "nothing.yaml"),
        (["train", "sed=1"], "unknown key sed; did you mean seed?"),
        (["convert", "lora", "nothing.safetensors", "out.safetensors", "--to", "kohya"], "nothing.safetensors"),
        (["convert", "lora", "a", "b"], "--to"),
        (["fly"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("doctor") == 0
    assert "jax" in capsys.readouterr().out
