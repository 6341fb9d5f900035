"""Whole images with LoRAs of every layout: against diffusers where it reads the layout, else against its own pipeline
with weights that were changed by hand, from the published formulas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file, save_file

from hypersd_jax.adapters import Adapter
from hypersd_jax.weights import write_lora
from hypersd_jax.weights.lora.merge import merge_loras
from hypersd_jax.weights.lora.sgm import sgm_names
from tests.helpers.lora_files import TEXT_TARGETS, dotted_tensors, kohya_tensors, random_adapter
from tests.helpers.lora_images import ANOTHER, TOLERANCE, Both
from tests.helpers.lora_kinds import dora, random_kind
from tests.helpers.tiny_pipelines import tiny_sd, tiny_sdxl
from tests.helpers.torch_weights import relative_error

STYLE_SCALE = 0.6
FEW = ("attn2.to_q", "attn1.to_out.0", "resnets.0.conv1", "ff.net.2", "proj_in")
KINDS = {
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "LoHa",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "LoKr whole pair",
    "mid_block.resnets.0.conv1": "LoHa tucker",
    "mid_block.resnets.0.conv2": "LoKr pair tucker",
    "mid_block.resnets.1.conv1": "LoRA tucker",
    "mid_block.resnets.1.conv2": "full",
    "mid_block.resnets.1.time_emb_proj": "LoRA",
}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    make = {"sd": tiny_sd, "sdxl": tiny_sdxl}[request.param]
    return Both(make(tmp_path_factory.mktemp(request.param), attentive=True))


@pytest.fixture
def both(loaded: Both) -> Iterator[Both]:
    yield loaded
    loaded.unload()


def is_xl(both: Both) -> bool:
    return both.ours.base.reads_size


def shapes_of(both: Both) -> Mapping[str, Mapping[str, Any]]:
    return both.ours.base.shapes


def style(both: Both, seed: int) -> dict[str, Adapter]:
    """A LoRA of some UNet modules and of all text encoders, rank 3, alpha equal to the rank."""
    shapes = shapes_of(both)
    text = [name for name in shapes if name != "unet"]
    return {
        "unet": random_adapter(shapes["unet"], seed, rank=3, scale=0.5, targets=FEW),
        **{name: random_adapter(shapes[name], seed + 1, rank=3, scale=0.4, targets=TEXT_TARGETS) for name in text},
    }


def fast_file(both: Both, path: Path) -> Path:
    """As Hyper-SD's are: kohya under diffusers' names, the UNet's 14 modules, alpha 8 whatever the rank."""
    adapter = random_adapter(shapes_of(both)["unet"], 1, rank=16)
    save_file(kohya_tensors("lora_unet_", adapter, 8.0), path, {"format": "pt"})
    return path


def style_file(both: Both, path: Path) -> Path:
    """As trainers write them: SDXL's under sgm's names, SD's as PEFT, both with text encoders."""
    layout = "kohya-sgm" if is_xl(both) else "peft"
    write_lora(path, style(both, 5), layout=layout, shapes=shapes_of(both))
    return path


def assert_same_images(both: Both, guidance: float, base: np.ndarray | None = None) -> np.ndarray:
    found, expected = both.sample_ours(guidance), both.sample_theirs(guidance)
    assert relative_error(found, expected) < TOLERANCE
    if base is not None:
        assert relative_error(found, base) > ANOTHER
    return found


def test_a_fast_lora_and_a_style_at_their_own_scales(tmp_path: Path, both: Both) -> None:
    """The commonest use of all; afterwards as one file that diffusers reads."""
    base = assert_same_images(both, 0.0)
    fast, style = fast_file(both, tmp_path / "fast.safetensors"), style_file(both, tmp_path / "style.safetensors")
    assert both.ours.load_lora(fast).scales == (0.5, 0.5)
    both.ours.load_lora(style)
    both.load_theirs(fast, "fast")
    both.load_theirs(style, "style")
    images = []
    for scales in ((1.0, STYLE_SCALE), (0.8, -0.4)):
        for name, scale in zip(("fast", "style"), scales, strict=True):
            both.ours.set_lora_scale(name, scale)
        both.theirs.set_adapters(["fast", "style"], adapter_weights=list(scales))
        images.append(assert_same_images(both, 0.0, base))
    assert relative_error(*images) > ANOTHER
    merged = tmp_path / "merged.safetensors"
    merge_loras([(fast, 0.8), (style, -0.4)], merged, base=both.ours.base.source)
    both.theirs.unload_lora_weights()
    both.load_theirs(merged, "merged")
    assert relative_error(both.sample_theirs(0.0), images[1]) < TOLERANCE


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_what_we_write_with_text_encoders(tmp_path: Path, both: Both, layout: str) -> None:
    if layout == "kohya" and is_xl(both):
        layout = "kohya-sgm"  # `tests/parity/test_pipeline_loras.py` samples with the plain naming
    base = both.sample_ours(0.0)
    write_lora(tmp_path / "a.safetensors", style(both, 7), layout=layout, shapes=shapes_of(both))
    assert both.ours.load_lora(tmp_path / "a.safetensors").layout == {"peft": "PEFT"}.get(layout, layout)
    both.load_theirs(tmp_path / "a.safetensors", "a")
    assert_same_images(both, 0.0, base)


def old_names(key: str) -> str:
    """Attention as diffusers named it in early 2023."""
    for name in ("q", "k", "v", "out"):
        for new in (f".to_{name}.0.lora.", f".to_{name}.lora."):
            key = key.replace(new, f".processor.to_{name}_lora.")
    return key


@pytest.mark.parametrize("age", ["early 2023", "late 2023"])
def test_the_old_layouts_of_diffusers(tmp_path: Path, both: Both, age: str) -> None:
    base = both.sample_ours(0.0)
    adapters = style(both, 9)
    targets = ("to_q", "to_k", "to_v", "to_out.0") if age == "early 2023" else FEW
    unet = random_adapter(shapes_of(both)["unet"], 9, scale=1.0, targets=targets)
    tensors = dotted_tensors("unet.", unet, ".lora.down.weight", ".lora.up.weight")
    for name, adapter in adapters.items():
        if name != "unet":
            ends = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
            tensors |= dotted_tensors(f"{name}.", adapter, *ends)
    file = tmp_path / "a.safetensors"
    save_file({old_names(key) if age == "early 2023" else key: value for key, value in tensors.items()}, file)
    assert both.ours.load_lora(file).layout == "diffusers"
    both.load_theirs(file, "a")
    assert_same_images(both, 0.0, base)


def dora_file(both: Both, folder: Path) -> Path:
    """A DoRA by PEFT of Linears and convolutions with magnitudes moved away from the norms, saved by diffusers."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_pretrained(both.ours.base.source, subfolder="unet")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "ff.net.2", "conv1", "conv_shortcut", "downsamplers.0.conv"],
        init_lora_weights=False,
        use_dora=True,
    )
    unet.add_adapter(config)
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if "lora_magnitude_vector" in name:
                value *= torch.rand(value.shape) + 0.5
            elif ".lora_B." in name:
                value *= 0.3
    state = peft.get_peft_model_state_dict(unet)
    fields = unet.peft_config["default"].to_dict()
    type(both.theirs).save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=fields)
    return folder / "pytorch_lora_weights.safetensors"


def test_dora_by_peft_alone_and_beside_a_fast_lora(tmp_path: Path, both: Both) -> None:
    base = both.sample_ours(0.0)
    file, fast = dora_file(both, tmp_path / "dora"), fast_file(both, tmp_path / "fast.safetensors")
    assert any("lora_magnitude_vector" in key for key in load_file(file))
    assert both.ours.load_lora(file, name="dora").kinds.keys() == {"LoRA with DoRA"}
    both.load_theirs(file, "dora")
    alone = assert_same_images(both, 0.0, base)
    both.ours.load_lora(fast, scale=0.7, name="fast")
    both.load_theirs(fast, "fast")
    both.theirs.set_adapters(["dora", "fast"], adapter_weights=[1.0, 0.7])
    together = assert_same_images(both, 0.0, base)
    assert relative_error(together, alone) > ANOTHER
    both.ours.fuse_lora()
    assert relative_error(both.sample_ours(0.0), together) < TOLERANCE
    both.ours.unfuse_lora()
    both.ours.unload_lora()
    np.testing.assert_array_equal(both.sample_ours(0.0), base)


@pytest.mark.parametrize("with_dora", [False, True])
def test_lycoris_kinds_against_weights_changed_by_hand(tmp_path: Path, both: Both, with_dora: bool) -> None:
    """Half strength, under kohya's naming of the family; diffusers refuses such files, so it gets the weights."""
    base = both.sample_ours(0.0)
    unet = both.theirs.unet
    names = sgm_names({path.rpartition(".")[0] for path in shapes_of(both)["unet"]})
    tensors: dict[str, np.ndarray] = {}
    kept: dict[str, Any] = {}
    with torch.no_grad():
        for seed, (module, kind) in enumerate(KINDS.items()):
            weight = unet.get_submodule(module).weight
            before = weight.detach().numpy().copy()
            found, change = random_kind(kind, before.shape, seed)
            if with_dora:
                kept_axes = (len(before), *[1] * (before.ndim - 1))
                magnitude = np.random.default_rng(seed).uniform(0.5, 1.5, kept_axes).astype(np.float32)
                found["dora_scale"] = magnitude
                change = dora(before, change, magnitude) - before
            name = (names[module] if is_xl(both) else module).replace(".", "_")
            tensors |= {f"lora_unet_{name}.{suffix}": np.ascontiguousarray(value) for suffix, value in found.items()}
            kept[module] = weight.clone()
            weight += torch.from_numpy((0.5 * change).astype(np.float32))
    save_file(tensors, tmp_path / "a.safetensors")
    report = both.ours.load_lora(tmp_path / "a.safetensors", scale=0.5, name="a")
    try:
        assert report.modules == {"unet": len(KINDS)}
        assert_same_images(both, 0.0, base)
        both.ours.set_lora_scale("a", 0.0)
        assert relative_error(both.sample_ours(0.0), base) < 1e-6  # the one pair of factors adds zeros in the network
        both.ours.unload_lora()
        np.testing.assert_array_equal(both.sample_ours(0.0), base)
    finally:
        with torch.no_grad():
            for module, weight in kept.items():
                unet.get_submodule(module).weight.copy_(weight)
