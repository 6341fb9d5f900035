"""The text inside images, read back by the web UI's rules."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from hypersd_jax.diffusion import SOLVERS
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import CallSettings
from hypersd_jax.pipeline.settings import fill_in
from hypersd_jax.png_text import UsedLora, lora_hash, name_of, parameters_text, save_images, schedule_type
from hypersd_jax.presets import Preset
from tests.helpers.infotext import parse, text_of

DDIM = Preset(sampler="ddim", steps=4)
GUIDED = Preset(sampler="ddim", steps=4, guidance=3.0)
LORAS = (
    UsedLora(name="fast", scale=1.0, hash="0123456789ab"),
    UsedLora(name="style", scale=-0.25, hash="cdef01234567"),
)


def settings(stated: Preset = DDIM, config: dict | None = None, **more) -> CallSettings:
    """Those of a call with these settings, on a model with this scheduler configuration."""
    call = {
        "seed": 7,
        "num_images": 1,
        "height": 768,
        "width": 512,
        "strength": 1.0,
        "control_scales": (),
        "guess_mode": False,
        "long_prompts": "cut",
        "tiled": False,
    }
    filled = fill_in(stated, config or {}, embeds_guidance=False)
    return CallSettings(**dataclasses.asdict(filled), **{**call, **more})


def text(prompt: str = "a cat", stated: Preset = DDIM, seed: int = 7, **more) -> str:
    return parameters_text(prompt, settings(stated, seed=seed), **{"model": "sd15", **more})


def image(size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))


def test_the_whole_text():
    version = parse(text()).values["Version"]
    assert text(loras=LORAS, more={"Denoising strength": "0.5", "VAE": None}) == (
        "a cat <lora:fast:1> <lora:style:-0.25>\n"
        "Steps: 4, Sampler: DDIM, Schedule type: SGM Uniform, CFG scale: 1, Seed: 7, Size: 512x768, Model: sd15, "
        "Eta DDIM: 0, Denoising strength: 0.5, "
        f'Lora hashes: "fast: 0123456789ab, style: cdef01234567", Version: {version}'
    )
    assert version.startswith("hypersd_jax 0.")


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "a, b",
        "a: b",
        'a "b" c',
        '"a"',
        "back\\slash, n",
        'a\\", b: "',
        "two\nlines",
        "é漢, \U0001f34e",
        "1x2x3",
        "a\\",
    ],
)
def test_any_value_comes_back(value: str):
    found = parse(text(model=value, more={"Latents": value}))
    assert (found.prompt, found.negative) == ("a cat", "")
    assert found.values["Model"] == found.values["Latents"] == value
    assert (found.values["Seed"], found.values["Size-1"], found.values["Size-2"]) == ("7", "512", "768")


@pytest.mark.parametrize(
    "prompt", ["a cat", "two\nlines", "Steps: 3, Sampler: x, Seed: 1", 'he said: "é, 漢"', "(a:1.2), b"]
)
def test_prompts_come_back(prompt: str):
    found = parse(text(prompt, GUIDED, negative="ugly, Steps: 9\nbad: hands", loras=LORAS))
    assert found.bare_prompt == prompt
    assert found.loras == [("fast", 1.0), ("style", -0.25)]
    assert found.negative == "ugly, Steps: 9\nbad: hands"
    assert found.values["Steps"] == "4"


def test_an_empty_prompt():
    assert parse(text("")).prompt == ""
    found = parse(text("", GUIDED, negative="ugly"))
    assert (found.prompt, found.negative) == ("", "ugly")


def test_every_solver_has_a_name():
    names = {name: parse(text(stated=Preset(sampler=name, steps=4))).values["Sampler"] for name in SOLVERS}
    assert names == {
        "ddim": "DDIM",
        "tcd": "TCD",
        "lcm": "LCM",
        "euler": "Euler",
        "euler_a": "Euler a",
        "dpmpp_2m": "DPM++ 2M",
    }


@pytest.mark.parametrize(
    ("stated", "config", "name"),
    [
        (Preset(sampler="ddim"), {"timestep_spacing": "leading"}, "SGM Uniform"),
        (Preset(sampler="ddim", spacing="leading"), {}, "DDIM"),
        (Preset(sampler="lcm"), {"timestep_spacing": "leading"}, None),
        (Preset(sampler="tcd", spacing="linspace"), {}, "Uniform"),
        (Preset(sampler="tcd", timesteps=(999, 500)), {}, None),
        (Preset(sampler="euler"), {}, "Uniform"),
        (Preset(sampler="euler_a"), {"timestep_spacing": "leading"}, "DDIM"),
        (Preset(sampler="euler", spacing="trailing"), {"use_karras_sigmas": True}, "Karras"),
        (Preset(sampler="dpmpp_2m"), {"use_exponential_sigmas": True}, "Exponential"),
        (Preset(sampler="dpmpp_2m"), {"use_beta_sigmas": True}, "Beta"),
        (Preset(sampler="ddim"), {"use_karras_sigmas": True}, "SGM Uniform"),
    ],
)
def test_schedule_type(stated: Preset, config: dict, name: str | None):
    assert schedule_type(settings(dataclasses.replace(stated, steps=2), config)) == name


def test_numbers_as_they_are_used():
    stated = Preset(sampler="tcd", steps=2, eta=0.3, guidance=7.5, timesteps=(999, 499))
    values = parse(text(stated=stated, seed=-1)).values
    assert values["Seed"] == str(2**32 - 1)
    assert values["CFG scale"] == "7.5"
    assert values["Eta"] == "0.3"
    assert values["Timesteps"] == "999, 499"
    assert "Schedule type" not in values
    assert parse(text(stated=Preset(sampler="euler", steps=2, guidance=1.0))).values["CFG scale"] == "1"
    assert "Eta" not in parse(text(stated=Preset(sampler="euler", steps=2))).values


def test_names():
    assert name_of("folder/my-lora.safetensors") == "my-lora"
    assert name_of("folder/sd-v1.5/") == "sd-v1.5"
    assert name_of("owner/name@main/file.safetensors") == "file"
    assert name_of("a:b, c>.safetensors") == "a_b__c_"
    assert name_of("caf\udce9/caf\udce9.safetensors") == "caf?"  # bytes that are not UTF-8


def test_a_loras_hash_is_of_its_tensors_alone(tmp_path: Path):
    tensors = {"a": np.arange(6, dtype=np.float32)}
    for name, notes in (("plain", None), ("noted", {"note": "long " * 9})):
        save_file(tensors, tmp_path / name, metadata=notes)
    expected = hashlib.sha256(tensors["a"].tobytes()).hexdigest()[:12]
    assert lora_hash(tmp_path / "plain") == lora_hash(tmp_path / "noted") == expected


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_the_text_is_in_the_file(tmp_path: Path, suffix: str):
    texts = [text("é漢 \U0001f34e"), text("plain")]
    paths = save_images([image()] * 2, tmp_path / "new" / f"out{suffix}", texts)
    assert paths == [tmp_path / "new" / f"out-00{i}{suffix}" for i in range(2)]
    assert [text_of(path) for path in paths] == texts
    assert sorted((tmp_path / "new").iterdir()) == paths
    assert [Image.open(path).size for path in paths] == [(8, 8)] * 2


def test_one_image_without_a_text(tmp_path: Path):
    assert save_images([image()], tmp_path / "out.png") == [tmp_path / "out.png"]
    with Image.open(tmp_path / "out.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(image()))
        assert saved.text == {}


def test_a_text_that_is_no_unicode(tmp_path: Path):
    (path,) = save_images([image()], tmp_path / "out.png", [text("a\udcffb")])
    assert parse(text_of(path)).prompt == "a?b"


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path):
    for name, texts, words in (
        ("out.gif", None, "must end in"),
        ("out.png", ["one", "two"], "2 texts for 1 images"),
        ("out.jpg", ["long " * 20_000], "out.jpg: cannot be written"),
        ("file/out.png", ["x"], "cannot be written"),
    ):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(UserError, match=words):
            save_images([image()], tmp_path / name, texts)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
