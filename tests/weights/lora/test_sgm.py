"""sgm's module names: read in every spelling, written for SDXL, and known to the programs that read our files."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hypersd_jax.adapters import target_paths
from hypersd_jax.errors import UserError
from hypersd_jax.weights import convert_lora, read_lora, write_lora
from hypersd_jax.weights.families import adaptable_shapes
from hypersd_jax.weights.lora import kohya
from hypersd_jax.weights.lora.sgm import sgm_names
from tests.helpers.configs import SD15, SD21, SDXL, TINY_TEXT, TINY_UNET
from tests.helpers.lora_files import TEXT_TARGETS, assert_same_delta, dotted_tensors, kohya_tensors, random_adapter
from tests.helpers.lora_readers import comfyui_keys, ldm_modules, webui_key

FAMILIES = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
XL_UNET: dict[str, Any] = {
    **TINY_UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "block_out_channels": [8, 8, 16],
    "cross_attention_dim": 32,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
    "transformer_layers_per_block": [1, 1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
XL = adaptable_shapes({"unet": XL_UNET, "text_encoder": TINY_TEXT, "text_encoder_2": TINY_TEXT})


@functools.cache
def unet_shapes(family: str) -> dict[str, jax.ShapeDtypeStruct]:
    return adaptable_shapes({"unet": FAMILIES[family]["unet"]})["unet"]


def modules_of(shapes: dict[str, Any]) -> list[str]:
    return sorted({path.rpartition(".")[0] for path in shapes})


def names_written(shapes: dict[str, Any], names: dict[str, str] | None) -> dict[str, str]:
    """``{module: the part of its keys before the first dot}`` as a file of the 14-module list has them."""
    written = {}
    for module in target_paths(shapes):
        entry = {
            "down": np.broadcast_to(np.float32(0), (*shapes[module + ".kernel"].shape[:-1], 1)),
            "up": np.broadcast_to(np.float32(0), (1, shapes[module + ".kernel"].shape[-1])),
            "scale": np.ones(1, np.float32),
        }
        keys = [key for key, _ in kohya.encode("unet", {module: entry}, dtype=np.float16, text_encoders=1, names=names)]
        stems = {key.partition(".")[0] for key in keys}
        assert len(keys) == 3
        assert len(stems) == 1
        written[module] = stems.pop()
    return written


@pytest.mark.parametrize(
    ("ours", "sgm"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        ),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("mid_block.resnets.0.conv2", "middle_block.0.out_layers.3"),
        (
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
            "middle_block.1.transformer_blocks.9.ff.net.0.proj",
        ),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        (
            "up_blocks.0.attentions.2.transformer_blocks.3.attn2.to_out.0",
            "output_blocks.2.1.transformer_blocks.3.attn2.to_out.0",
        ),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.2.resnets.2.norm2", "output_blocks.8.0.out_layers.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
    ],
)
def test_names_in_sdxl(ours: str, sgm: str) -> None:
    assert sgm_names(modules_of(unet_shapes("sdxl")))[ours] == sgm


def test_the_first_upsampler_of_sd15_has_no_attention_before_it() -> None:
    names = sgm_names(modules_of(unet_shapes("sd15")))
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert names["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_has_one_name_and_that_of_the_network_s_construction(family: str) -> None:
    modules = modules_of(unet_shapes(family))
    names = sgm_names(modules)
    assert names.keys() == set(modules)
    assert len(set(names.values())) == len(names)
    built = ldm_modules(FAMILIES[family]["unet"], modules)
    outside = {"conv_in", "conv_out", "conv_norm_out"}
    assert {module.partition(".")[0] for module in set(modules) - set(built)} - outside <= {
        "time_embedding",
        "add_embedding",
    }
    assert {module: names[module] for module in built} == built


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["kohya", "kohya-sgm"])
def test_comfyui_knows_every_key_and_takes_it_for_the_right_module(family: str, layout: str) -> None:
    shapes = unet_shapes(family)
    modules = modules_of(shapes)
    known, built = comfyui_keys(FAMILIES[family]["unet"], modules), ldm_modules(FAMILIES[family]["unet"], modules)
    written = names_written(shapes, sgm_names(modules) if layout == "kohya-sgm" else None)
    assert {"sd15": 278, "sd21": 278, "sdxl": 788}[family] == len(written)
    assert {module: known.get(name) for module, name in written.items()} == {m: built[m] for m in written}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["kohya", "kohya-sgm"])
def test_the_web_ui_knows_every_key_but_one(family: str, layout: str) -> None:
    """AUTOMATIC1111 looks for SDXL's first upsampler where SD 1.5's is, so diffusers' name for it finds nothing."""
    shapes = unet_shapes(family)
    built = ldm_modules(FAMILIES[family]["unet"], modules_of(shapes))
    written = names_written(shapes, sgm_names(modules_of(shapes)) if layout == "kohya-sgm" else None)
    lost = {module for module, name in written.items() if webui_key(name) != built[module].replace(".", "_")}
    assert lost == ({"up_blocks.0.upsamplers.0.conv"} if (family, layout) == ("sdxl", "kohya") else set())


def test_text_encoder_keys_are_those_that_every_reader_knows(tmp_path: Path) -> None:
    adapters = {name: random_adapter(XL[name], 0, targets=TEXT_TARGETS) for name in ("text_encoder", "text_encoder_2")}
    write_lora(tmp_path / "a.safetensors", adapters)
    parts = ("mlp_fc1", "mlp_fc2", *(f"self_attn_{part}_proj" for part in ("k", "q", "v", "out")))
    expected = {
        f"lora_te{te}_text_model_encoder_layers_{layer}_{part}" for te in "12" for layer in (0, 1) for part in parts
    }
    assert {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")} == expected


def random_adapters(seed: int) -> dict[str, Any]:
    text = {
        name: random_adapter(XL[name], seed + 1, targets=TEXT_TARGETS) for name in ("text_encoder", "text_encoder_2")
    }
    return {"unet": random_adapter(XL["unet"], seed), **text}


def renamed(adapter: dict[str, Any]) -> dict[str, Any]:
    names = sgm_names(modules_of(XL["unet"]))
    return {names[module]: entry for module, entry in adapter.items()}


def test_a_file_of_kohya_s_trainer_is_read(tmp_path: Path) -> None:
    adapters = random_adapters(0)
    tensors = kohya_tensors("lora_unet_", renamed(adapters["unet"]), 4.0)
    tensors |= kohya_tensors("lora_te1_", adapters["text_encoder"], 4.0)
    tensors |= kohya_tensors("lora_te2_", adapters["text_encoder_2"], 4.0)
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = read_lora(tmp_path / "a.safetensors", XL)
    assert loaded.report.layout == "kohya-sgm"
    for component, adapter in adapters.items():
        assert_same_delta(loaded.adapters[component], adapter)


def test_what_comfyui_saves_is_read(tmp_path: Path) -> None:
    adapters = random_adapters(2)
    suffixes = (".lora_down.weight", ".lora_up.weight")
    tensors = dotted_tensors("diffusion_model.", renamed(adapters["unet"]), *suffixes)
    tensors |= dotted_tensors("text_encoders.clip_l.transformer.", adapters["text_encoder"], *suffixes)
    tensors |= dotted_tensors("text_encoders.clip_g.transformer.", adapters["text_encoder_2"], *suffixes)
    norm = np.full(XL["unet"]["mid_block.resnets.0.norm1.scale"].shape, 0.5, np.float32)
    tensors["diffusion_model.middle_block.0.in_layers.0.diff"] = norm
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = read_lora(tmp_path / "a.safetensors", XL)
    assert loaded.report.layout == "ComfyUI"
    for component, adapter in adapters.items():
        assert_same_delta(loaded.adapters[component], adapter)
    np.testing.assert_array_equal(loaded.differences["unet"]["mid_block.resnets.0.norm1"]["full"], norm)


def test_sgm_names_of_sd15_are_read_too(tmp_path: Path) -> None:
    shapes = adaptable_shapes({"unet": TINY_UNET})
    adapter = random_adapter(shapes["unet"], 3)
    names = sgm_names(modules_of(shapes["unet"]))
    tensors = kohya_tensors("lora_unet_", {names[module]: entry for module, entry in adapter.items()}, 4.0)
    save_file(tensors, tmp_path / "a.safetensors")
    assert_same_delta(read_lora(tmp_path / "a.safetensors", shapes).adapters["unet"], adapter)


def test_kohya_sgm_is_written_and_read_back(tmp_path: Path) -> None:
    adapters = random_adapters(4)
    write_lora(tmp_path / "a.safetensors", adapters, layout="kohya-sgm", shapes=XL)
    keys = set(load_file(tmp_path / "a.safetensors"))
    assert "lora_unet_output_blocks_1_2_conv.lora_up.weight" in keys
    assert "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha" in keys
    assert not any("_blocks_0_resnets" in key for key in keys)
    loaded = read_lora(tmp_path / "a.safetensors", XL)
    assert loaded.report.layout == "kohya-sgm"
    for component, adapter in adapters.items():
        assert_same_delta(loaded.adapters[component], adapter)


def test_conversion_to_sgm_and_back_keeps_the_bits(tmp_path: Path) -> None:
    """By the family: a module of an SDXL LoRA is known to be of SDXL by the width of the text it attends to."""
    shapes = unet_shapes("sdxl")
    targets = ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "up_blocks.0.upsamplers.0.conv")
    first, second, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    write_lora(first, {"unet": random_adapter(shapes, 0, rank=2, targets=targets)}, dtype=np.float16)
    convert_lora(first, second, "kohya-sgm")
    assert {key.partition(".")[0] for key in load_file(second)} == {
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k",
        "lora_unet_output_blocks_2_2_conv",
    }
    convert_lora(second, third, "kohya")
    before, after = load_file(first), load_file(third)
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def test_only_sdxl_is_written_with_sgm_names(tmp_path: Path) -> None:
    shapes = adaptable_shapes({"unet": TINY_UNET})
    adapters = {"unet": random_adapter(shapes["unet"], 0)}
    for known in (shapes, None):
        with pytest.raises(UserError, match=r"a\.safetensors: only SDXL's LoRAs have sgm block names"):
            write_lora(tmp_path / "a.safetensors", adapters, layout="kohya-sgm", shapes=known)
    assert not (tmp_path / "a.safetensors").exists()
