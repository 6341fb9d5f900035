"""Whole images with LoRAs against diffusers': one file, loaded by both, from the same prompts and latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from hypersd_jax.weights import write_lora
from hypersd_jax.weights.components import assets
from tests.helpers.lora_files import TEXT_TARGETS, random_adapter
from tests.helpers.lora_images import ANOTHER, STEPS, TOLERANCE, Both
from tests.helpers.tiny_pipelines import tiny_sd
from tests.helpers.torch_weights import relative_error

SCALE_OF_FILE = 0.3


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("tiny"), attentive=True)


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Both:
    return Both(tiny_folder)


@pytest.fixture
def tiny(loaded: Both) -> Any:
    yield loaded
    loaded.unload()


@pytest.fixture(scope="module")
def files(loaded: Both, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three kohya files: of the UNet alone, and two of UNet and text encoder with other ranks and modules."""
    folder, shapes = tmp_path_factory.mktemp("loras"), loaded.ours.base.shapes
    few = ("attn2.to_q", "resnets.0.conv1", "ff.net.2")
    # With out_proj, by which diffusers tells kohya's text encoder keys; without it, it leaves q_proj out.
    few_of_text = ("q_proj", "out_proj", "fc1")
    adapters = {
        "unet": {"unet": random_adapter(shapes["unet"], 1, scale=SCALE_OF_FILE)},
        "first": {
            "unet": random_adapter(shapes["unet"], 2, scale=SCALE_OF_FILE),
            "text_encoder": random_adapter(shapes["text_encoder"], 3, rank=3, scale=0.5, targets=TEXT_TARGETS),
        },
        "second": {
            "unet": random_adapter(shapes["unet"], 4, rank=7, scale=SCALE_OF_FILE, targets=few),
            "text_encoder": random_adapter(shapes["text_encoder"], 5, rank=2, scale=0.5, targets=few_of_text),
        },
    }
    for name, content in adapters.items():
        write_lora(folder / f"{name}.safetensors", content, layout="kohya")
    return {name: folder / f"{name}.safetensors" for name in adapters}


@pytest.mark.parametrize("guidance", [0.0, 5.0])
@pytest.mark.parametrize("name", ["unet", "first"])
def test_a_kohya_file_of_ours(tiny: Both, files: dict[str, Path], name: str, guidance: float) -> None:
    base = tiny.sample_ours(guidance)
    assert relative_error(base, tiny.sample_theirs(guidance)) < TOLERANCE
    report = tiny.ours.load_lora(files[name])
    assert report.layout == "kohya"
    tiny.load_theirs(files[name], "a")
    found, expected = tiny.sample_ours(guidance), tiny.sample_theirs(guidance)
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(found, base) > ANOTHER


def test_a_file_fused_into_the_weights(tiny: Both, files: dict[str, Path]) -> None:
    """Scale 0.5, fused by both; afterwards both sample as the base again."""
    base = tiny.sample_ours(0.0)
    tiny.ours.load_lora(files["first"], scale=0.5)
    tiny.load_theirs(files["first"], "a")
    tiny.ours.fuse_lora()
    tiny.theirs.fuse_lora(lora_scale=0.5)
    found, expected = tiny.sample_ours(0.0), tiny.sample_theirs(0.0)
    tiny.ours.unfuse_lora()
    tiny.theirs.unfuse_lora()
    tiny.unload()
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(found, base) > ANOTHER
    np.testing.assert_array_equal(tiny.sample_ours(0.0), base)


@pytest.mark.parametrize("scales", [(0.7, -0.3), (0.4, 1.2)])
def test_two_files_with_their_own_scales(tiny: Both, files: dict[str, Path], scales: tuple[float, float]) -> None:
    for name, file, scale in zip("ab", (files["first"], files["second"]), scales, strict=True):
        tiny.ours.load_lora(file, scale=scale, name=name)
        tiny.load_theirs(file, name)
    tiny.theirs.set_adapters(["a", "b"], list(scales))
    found, expected = tiny.sample_ours(5.0), tiny.sample_theirs(5.0)
    assert relative_error(found, expected) < TOLERANCE
    # Neither file is left out, and the scales are not exchanged.
    for wrong in ((scales[0], 0.0), (0.0, scales[1]), scales[::-1]):
        for name, scale in zip("ab", wrong, strict=True):
            tiny.ours.set_lora_scale(name, scale)
        assert relative_error(tiny.sample_ours(5.0), expected) > ANOTHER, wrong


def test_the_shipped_lora_on_the_embedded_teacher() -> None:
    """The real adapter on the real teacher, as its own header says to sample it: 4 DDIM steps without guidance."""
    both = Both(assets() / "teacher")
    file = assets() / "loras" / "tscd-4.safetensors"
    base = both.sample_ours(0.0)
    both.ours.load_lora(file)
    plan = both.ours.settings()
    assert (plan.steps, plan.sampler, plan.guidance, plan.eta) == (STEPS, "ddim", 0.0, 0.0)
    both.load_theirs(file, "tscd")
    found, expected = both.sample_ours(0.0), both.sample_theirs(0.0)
    assert relative_error(found, expected) < TOLERANCE
    header = dict.fromkeys(("steps", "sampler", "eta", "spacing"))
    np.testing.assert_array_equal(both.sample_ours(None, **header), found)
    assert relative_error(found, base) > 0.05
    both.ours.set_lora_scale("tscd-4", 0.5)
    both.theirs.set_adapters(["tscd"], [0.5])
    half = both.sample_ours(0.0)
    assert relative_error(half, both.sample_theirs(0.0)) < TOLERANCE
    assert relative_error(half, found) > 0.02
    assert relative_error(half, base) > 0.02
