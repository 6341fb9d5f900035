"""Which LoRA says how to sample, and how a pipeline names itself and a call's arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import hypersd_jax as hs
from hypersd_jax.errors import UserError
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.lora import write_lora
from tests.helpers.lora_files import random_adapter
from tests.helpers.tiny_model import tiny_model

EIGHT = {
    "sampler": "ddim",
    "steps": "8",
    "eta": "0.0",
    "guidance": "0.0",
    "timesteps": json.dumps([*range(999, 0, -125)]),
}
TWO = {"sampler": "tcd", "steps": "2", "eta": "0.4", "guidance": "0.0"}
FOREIGN = {"steps": "1500 / 3000", "sampler": "prodigy", "guidance": "high", "timesteps": "uniform", "eta": "1e-8 x"}
LOOKS_LIKE = {"steps": "20", "sampler": "euler_a", "guidance": "9.0", "eta": "0.5"}
KOHYA = {"format": "pt", "ss_network_module": "networks.lora", "ss_training_comment": "None"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> hs.Pipeline:
    return hs.Pipeline.from_pretrained(tiny_model(tmp_path_factory.mktemp("settings") / "model"))


@pytest.fixture(autouse=True)
def clean(pipe: hs.Pipeline) -> None:
    if pipe._fused is not None:
        pipe.unfuse_lora()
    pipe.unload_lora()


@pytest.fixture
def lora(pipe: hs.Pipeline, tmp_path: Path) -> Callable[..., Path]:
    """Writes a LoRA: with settings of ours, or with another program's header."""

    def write(name: str, settings: dict[str, str] | None = None, *, foreign: dict[str, str] | None = None) -> Path:
        path = tmp_path / f"{name}.safetensors"
        write_lora(path, {"unet": random_adapter(pipe.base.shapes["unet"], len(name))}, metadata=settings)
        if foreign is not None:
            save_file(load_file(path), path, {**KOHYA, **foreign})
        return path

    return write


def said(plan: Any) -> tuple[Any, ...]:
    return plan.sampler, plan.steps, plan.eta, plan.guidance


BASE, OF_EIGHT, OF_TWO = ("ddim", 25, 0.0, 7.5), ("ddim", 8, 0.0, 0.0), ("tcd", 2, 0.4, 0.0)


def test_the_last_lora_that_states_settings_decides(pipe: hs.Pipeline, lora: Callable[..., Path]) -> None:
    pipe.load_lora(lora("style"))
    assert said(pipe.settings()) == BASE
    pipe.load_lora(lora("eight", EIGHT))
    pipe.load_lora(lora("two", TWO), 0.5)
    pipe.load_lora(lora("other-style"), 0.7)
    pipe.load_lora(lora("trained-elsewhere", foreign=FOREIGN))
    assert said(pipe.settings()) == OF_TWO
    assert pipe.settings().timesteps is None  # all of one LoRA's, none of another's
    pipe.set_lora_scale("two", 0.0)  # still loaded
    assert said(pipe.settings()) == OF_TWO
    assert said(pipe.settings(steps=4)) == ("tcd", 4, 0.4, 0.0)
    pipe.fuse_lora()
    assert said(pipe.settings()) == OF_TWO
    pipe.unfuse_lora()
    pipe.unload_lora("two")
    assert said(pipe.settings()) == OF_EIGHT
    assert pipe.settings().timesteps == tuple(range(999, 0, -125))
    pipe.load_lora(lora("again", TWO), name="style")  # replaced, which moves it to the end
    assert said(pipe.settings()) == OF_TWO
    pipe.unload_lora()
    assert said(pipe.settings()) == BASE


def test_released_names_take_part(pipe: hs.Pipeline, lora: Callable[..., Path]) -> None:
    pipe.load_lora(lora("eight", EIGHT))
    pipe.load_lora(lora("TCD-SD15-LoRA", foreign=FOREIGN))
    pipe.load_lora(lora("style"))
    assert said(pipe.settings()) == ("tcd", 4, 0.3, 0.0)
    pipe.load_lora(lora("two", TWO))
    assert said(pipe.settings()) == OF_TWO


@pytest.mark.parametrize("header", [FOREIGN, LOOKS_LIKE, {**LOOKS_LIKE, "timesteps": "[999, 499]"}, EIGHT])
def test_other_programs_headers_are_not_read_as_ours(
    pipe: hs.Pipeline, lora: Callable[..., Path], header: dict[str, str]
) -> None:
    pipe.load_lora(lora("elsewhere", foreign=header))
    assert said(pipe.settings()) == BASE
    assert said(pipe.settings(steps=4, sampler="lcm", guidance=1.0)) == ("lcm", 4, 0.0, 1.0)
    # Nor where a program hands the header on in memory.
    pipe.unload_lora()
    pipe.add_lora("it", {"unet": random_adapter(pipe.base.shapes["unet"], 0)}, metadata={**KOHYA, **header})
    assert said(pipe.settings()) == BASE


@pytest.fixture(scope="module")
def embedded() -> hs.Pipeline:
    return hs.Pipeline.from_pretrained("embedded")


@pytest.fixture(scope="module")
def style(embedded: hs.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the embedded model with another program's header."""
    path = tmp_path_factory.mktemp("style") / "style.safetensors"
    write_lora(path, {"unet": random_adapter(embedded.base.shapes["unet"], 0)})
    save_file(load_file(path), path, {**KOHYA, **FOREIGN})
    return path


@pytest.mark.parametrize("file", sorted((assets() / "loras").iterdir()), ids=lambda file: file.stem)
def test_shipped_loras_are_ours(embedded: hs.Pipeline, style: Path, tmp_path: Path, file: Path) -> None:
    """As files from before the mark, under any name, and through conversion and, two of them, a merge with a style."""
    embedded.unload_lora()
    embedded.load_lora(file)
    plan = embedded.settings()
    assert plan.steps == (1 if file.stem == "unified" else int(file.stem[-1]))
    assert plan.guidance == 0.0
    converted, wild = tmp_path / "one.safetensors", tmp_path / "wild.safetensors"
    hs.convert_lora(file, converted, "peft", base="embedded")
    made = [converted]
    if file.stem in ("tscd-4", "unified"):
        hs.merge_loras([(converted, 1.0), (style, 0.5)], wild, base="embedded")
        made.append(wild)
    for each in made:
        embedded.unload_lora()
        embedded.load_lora(each)
        embedded.load_lora(style)
        assert embedded.settings() == plan


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return dict(file.metadata())


def test_a_foreign_header_stays_foreign(pipe: hs.Pipeline, lora: Callable[..., Path], tmp_path: Path) -> None:
    base = pipe.base.source
    sources = [lora("elsewhere", foreign=LOOKS_LIKE), lora("as-well", foreign=LOOKS_LIKE)]
    hs.convert_lora(sources[0], tmp_path / "converted.safetensors", "kohya", base=base)
    hs.merge_loras([(source, 1.0) for source in sources], tmp_path / "merged.safetensors", base=base)
    for name in ("converted", "merged"):
        assert header_of(tmp_path / f"{name}.safetensors")["steps"] == "20"
        pipe.load_lora(tmp_path / f"{name}.safetensors")
        assert said(pipe.settings()) == BASE


def test_a_merge_samples_as_its_parts_do_together(pipe: hs.Pipeline, lora: Callable[..., Path], tmp_path: Path) -> None:
    parts = [lora("eight", EIGHT), lora("two", TWO), lora("elsewhere", foreign=LOOKS_LIKE), lora("style")]
    hs.merge_loras([(part, 1.0) for part in parts], tmp_path / "sum.safetensors", base=pipe.base.source)
    for part in parts:
        pipe.load_lora(part)
    together = pipe.settings()
    pipe.unload_lora()
    pipe.load_lora(tmp_path / "sum.safetensors")
    assert pipe.settings() == together
    assert said(together) == OF_TWO


BROKEN = {
    "steps": ("four", {"steps": 4}),
    "sampler": ("prodigy", {"sampler": "lcm"}),
    "guidance": ("nan", {"guidance": 0.0}),
    "eta": ("-", {"sampler": "lcm"}),  # which reads none
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_damaged_header_of_ours_matters_where_it_would_be_used(
    pipe: hs.Pipeline, lora: Callable[..., Path], key: str
) -> None:
    text, given = BROKEN[key]
    pipe.load_lora(lora("damaged", {**TWO, key: text}))
    pipe.load_lora(lora("style"))
    with pytest.raises(UserError, match=rf"damaged\.safetensors: its header's sampling settings .* \({key}: "):
        pipe.settings()
    plan = pipe.settings(**given)
    for name, value in given.items():
        assert getattr(plan, name) == value
    pipe.load_lora(lora("eight", EIGHT))  # asked first, so the other has no say
    assert said(pipe.settings()) == OF_EIGHT


@pytest.mark.parametrize("text", ["uniform", "[999, 'x']", "[999.5]", "[]", "7"])
def test_damaged_timesteps(pipe: hs.Pipeline, lora: Callable[..., Path], text: str) -> None:
    pipe.load_lora(lora("damaged", {**TWO, "timesteps": text}))
    with pytest.raises(UserError, match=r"settings cannot be read \(timesteps: "):
        pipe.settings()
    with pytest.warns(UserWarning, match=r"\(timesteps: .*the timesteps are left out"):
        assert said(pipe.settings(steps=4)) == ("tcd", 4, 0.4, 0.0)
    assert said(pipe.settings(steps=4, spacing="leading")) == ("tcd", 4, 0.4, 0.0)
    assert pipe.settings(steps=1, timesteps=(500,)).timesteps == (500,)


DIFFUSERS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "num_images_per_prompt": "num_images",
    "generator": "seed",
    "output_type": "output",
    "callback_on_step_end": "callback",
    "cross_attention_kwargs": "set_lora_scale",
    "controlnet_conditioning_scale": "control_scale",
    "mask_image": "mask",
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_names_are_told_ours(pipe: hs.Pipeline, name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name} is diffusers' name: use {DIFFUSERS[name]}\b"):
        pipe("a cat", **{name: 4})


def test_names_that_nobody_has(pipe: hs.Pipeline) -> None:
    with pytest.raises(TypeError, match=r"no argument 'stepps'; did you mean steps\?"):
        pipe("a cat", stepps=4)
    with pytest.raises(UserError, match="torch_dtype is diffusers' name: use dtype"):
        hs.Pipeline.from_pretrained("embedded", torch_dtype="float16")


def test_a_pipeline_and_a_report_in_one_line(pipe: hs.Pipeline, lora: Callable[..., Path]) -> None:
    folder = re.escape(str(pipe.base.source))
    assert re.fullmatch(rf"Pipeline\(model {folder}, LoRAs: none, float32 on \S+:0\)", repr(pipe))
    report = pipe.load_lora(lora("eight", EIGHT), 0.5)
    pipe.load_lora(lora("style"), -1)
    assert ", LoRAs: eight@0.5, style@-1, float32 on " in str(pipe)
    pipe.fuse_lora()
    assert "LoRAs: eight@0.5, style@-1 (fused)," in repr(pipe)
    assert re.fullmatch(r"<LoraReport \S+eight\.safetensors: kohya LoRA, \d+ unet modules, rank 4, .*>", repr(report))
    assert repr(hs.Pipeline.from_pretrained("embedded")).startswith("Pipeline(model embedded, LoRAs: none, ")
