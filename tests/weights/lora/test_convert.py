"""Converting between LoRA layouts keeps the change to the weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hypersd_jax.adapters import Adapter, scaled
from hypersd_jax.errors import UserError
from hypersd_jax.weights import convert_lora, open_tensors, read_lora, write_lora
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.families import FAMILIES, adaptable_shapes
from tests.helpers.configs import TINY, TINY_XL
from tests.helpers.lora_files import TEXT_TARGETS, assert_same_delta, dotted_tensors, kohya_tensors, random_adapter
from tests.helpers.lora_kinds import random_kind


@pytest.mark.parametrize("configs", [TINY, TINY_XL])
def test_there_and_back_with_a_base_folder(tmp_path: Path, configs: dict) -> None:
    for component, config in configs.items():
        (tmp_path / "base" / component).mkdir(parents=True)
        (tmp_path / "base" / component / "config.json").write_text(json.dumps(config))
    shapes = adaptable_shapes(configs)
    unet, text = random_adapter(shapes["unet"], 0), random_adapter(shapes["text_encoder"], 1, targets=TEXT_TARGETS)
    te = "lora_te_" if configs is TINY else "lora_te1_"
    kohya = kohya_tensors("lora_unet_", unet, 2.0) | kohya_tensors(te, text, 8.0)
    header = {"ss_network_alpha": "2", "ss_network_dim": "4", "ss_base_model_version": "sd_v1"}
    header |= {"ss_network_args": '{"conv_dim": "4"}', "sshs_model_hash": "a" * 64, "sshs_legacy_hash": "b" * 8}
    save_file(kohya, tmp_path / "a.safetensors", header)
    report = convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft", tmp_path / "base")
    assert report.layout == "kohya"
    convert_lora(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", tmp_path / "base")
    for name, layout in (("b", "PEFT"), ("c", "kohya")):
        loaded = read_lora(tmp_path / f"{name}.safetensors", shapes)
        assert loaded.report.layout == layout
        assert_same_delta(loaded.adapters["unet"], scaled(unet, 0.5))
        assert_same_delta(loaded.adapters["text_encoder"], scaled(text, 2.0))
        assert loaded.metadata["ss_base_model_version"] == "sd_v1"
    with open_tensors(tmp_path / "b.safetensors") as file:
        assert file.metadata.keys() == {"format", "ss_base_model_version", "lora_adapter_metadata"}
    with open_tensors(tmp_path / "c.safetensors") as file:
        assert "lora_adapter_metadata" not in file.metadata  # diffusers refuses a file with both this and alphas
        assert file.metadata["ss_network_alpha"] == "4"
        assert set(file.keys()) == set(kohya)


def test_the_base_may_be_a_whole_model(tmp_path: Path) -> None:
    """The shipped LoRA against the embedded model, which is of no known family."""
    source = assets() / "loras" / "tscd-4.safetensors"
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    convert_lora(source, first, "peft", "embedded")
    convert_lora(first, second, "kohya", "embedded")
    before, after = load_file(source), load_file(second)
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def family_adapter(family: str) -> Adapter:
    """A few modules are enough to tell the families apart: the width of the text they attend to is stored."""
    shapes = adaptable_shapes({"unet": FAMILIES[family]["unet"]})["unet"]
    return random_adapter(shapes, 0, rank=1, targets=("mid_block.attentions.0.transformer_blocks.0.attn2.to_k",))


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_the_family_is_found_from_the_file(tmp_path: Path, family: str) -> None:
    adapter = family_adapter(family)
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file(kohya_tensors("lora_unet_", adapter, 3.0, np.float16), tmp_path / "a.safetensors")
    convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft")
    tensors = load_file(tmp_path / "b.safetensors")
    assert tensors.keys() == {f"unet.{path}.lora_A.weight", f"unet.{path}.lora_B.weight"}
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float16)}
    convert_lora(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    with open_tensors(tmp_path / "c.safetensors") as file:  # by which A1111 sorts LoRAs
        expected = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0"}[family]
        assert file.metadata["ss_base_model_version"] == expected
    other = "sd15" if family == "sdxl" else "sdxl"
    with pytest.raises(UserError, match="cross-attention width"):
        convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft", family=other)


def test_dotted_files_of_unknown_models_are_converted_by_their_own_shapes(tmp_path: Path) -> None:
    shapes = adaptable_shapes(TINY)
    unet, text = random_adapter(shapes["unet"], 0), random_adapter(shapes["text_encoder"], 1, targets=TEXT_TARGETS)
    write_lora(tmp_path / "a.safetensors", {"unet": unet, "text_encoder": text}, layout="peft")
    convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    loaded = read_lora(tmp_path / "b.safetensors", shapes)
    assert_same_delta(loaded.adapters["unet"], unet)
    assert_same_delta(loaded.adapters["text_encoder"], text)


def test_refusals(tmp_path: Path) -> None:
    shapes = adaptable_shapes(TINY)["unet"]
    good, odd, oft, loha, out = (tmp_path / f"{name}.safetensors" for name in ("good", "odd", "oft", "loha", "out"))
    save_file(dotted_tensors("unet.", random_adapter(shapes, 0), ".lora_A.weight", ".lora_B.weight"), good)
    save_file(kohya_tensors("lora_unet_", random_adapter(shapes, 0), None), odd)
    save_file({"lora_unet_conv_in.oft_blocks": np.ones((2, 2), np.float32)}, oft)
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors, _ = random_kind("LoHa", (1280, 768), 0)
    save_file({f"lora_unet_{path.replace('.', '_')}.{name}": value for name, value in tensors.items()}, loha)
    for source, to, family, message in (
        (good, "comfy", None, "layout 'comfy'"),
        (good, "kohya", "sd3", "family 'sd3'"),
        (odd, "peft", None, "odd.safetensors: fits none of sd15, sd21, sdxl; name its base model"),
        (good, "kohya-sgm", None, r"out\.safetensors: only SDXL's LoRAs"),
        (oft, "peft", None, r"oft\.safetensors: OFT"),
        (loha, "peft", None, r"loha\.safetensors: holds LoHa, not only pairs of factors; merge it with a --rank"),
        (tmp_path / "none.safetensors", "peft", None, "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            convert_lora(source, out, to, family=family)
    with pytest.raises(UserError, match=r"unet/config\.json: no such file"):
        convert_lora(good, out, "kohya", tmp_path)
    assert not out.exists()
