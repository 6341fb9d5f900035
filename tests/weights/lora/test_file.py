"""LoRA files in every layout that is read, and the two that are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hypersd_jax.adapters import scaled, target_paths
from hypersd_jax.weights import open_tensors, read_lora, write_lora
from hypersd_jax.weights.families import adaptable_shapes
from hypersd_jax.weights.lora import kohya
from tests.helpers.configs import SD15, SDXL, TINY_XL
from tests.helpers.lora_files import (
    TEXT_TARGETS,
    assert_same_delta,
    dotted_tensors,
    kohya_tensors,
    random_adapter,
    torch_factors,
)

SHAPES = adaptable_shapes(TINY_XL)
UNET = random_adapter(SHAPES["unet"], 0)
TEXT = random_adapter(SHAPES["text_encoder"], 1, rank=3, targets=TEXT_TARGETS)
TEXT_2 = random_adapter(SHAPES["text_encoder_2"], 2, rank=2, targets=(*TEXT_TARGETS, "text_projection"))
ALL = {"unet": UNET, "text_encoder": TEXT, "text_encoder_2": TEXT_2}
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float16, 2e-3), (ml_dtypes.bfloat16, 2e-2)])
def test_what_is_written_is_read_back(tmp_path: Path, layout: str, dtype: Any, tolerance: float) -> None:
    adapters = {name: scaled(adapter, 0.3) for name, adapter in ALL.items()}
    write_lora(tmp_path / "a.safetensors", adapters, layout=layout, dtype=dtype, metadata={"steps": 4, "title": "t"})
    loaded = read_lora(tmp_path / "a.safetensors", SHAPES)
    assert loaded.adapters.keys() == adapters.keys()
    for name, adapter in adapters.items():
        assert_same_delta(loaded.adapters[name], adapter, tolerance)
    assert loaded.metadata["steps"] == "4"
    assert loaded.metadata["title"] == "t"
    assert loaded.metadata["format"] == "pt"
    assert loaded.report.dtypes == (np.dtype(dtype).name,)


def test_kohya_names_and_shapes(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", ALL, metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    tensors = load_file(tmp_path / "a.safetensors")
    assert len(tensors) == 3 * (len(UNET) + len(TEXT) + len(TEXT_2))
    shapes = {key: value.shape for key, value in tensors.items()}
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    assert shapes[f"{block}_attn1_to_out_0.lora_down.weight"] == (4, 8)
    assert shapes[f"{block}_ff_net_0_proj.lora_up.weight"] == (64, 4)
    assert shapes["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"] == (4, 8, 3, 3)
    assert shapes["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"] == (8, 4, 1, 1)
    assert shapes["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"] == (4, 16, 1, 1)
    assert shapes["lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight"] == (3, 16)
    assert shapes["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] == (32, 2)
    assert shapes["lora_te2_text_projection.lora_down.weight"] == (2, 24)
    alpha = tensors[f"{block}_attn1_to_q.alpha"]
    assert alpha.shape == ()
    assert alpha.dtype == np.float32
    assert alpha == 4
    with open_tensors(tmp_path / "a.safetensors") as file:
        assert file.metadata == {
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "Dynamic",
            "ss_network_alpha": "Dynamic",
            "ss_base_model_version": "sdxl_base_v1-0",
        }


def test_one_alpha_for_all_modules_where_ranks_differ(tmp_path: Path) -> None:
    """diffusers applies the most common alpha to every attention module, whatever the others state."""
    mixed = scaled(UNET | random_adapter(SHAPES["unet"], 3, rank=7, targets=("attn1.to_q",)), 0.3)
    write_lora(tmp_path / "a.safetensors", {"unet": mixed})
    alphas = [value for key, value in load_file(tmp_path / "a.safetensors").items() if key.endswith(".alpha")]
    assert set(map(float, alphas)) == {4.0}
    assert_same_delta(read_lora(tmp_path / "a.safetensors", SHAPES).adapters["unet"], mixed)


def test_the_only_text_encoder_is_lora_te(tmp_path: Path) -> None:
    write_lora(tmp_path / "one.safetensors", {"text_encoder": TEXT})
    assert all(key.startswith("lora_te_text_model_") for key in load_file(tmp_path / "one.safetensors"))
    write_lora(tmp_path / "two.safetensors", {"text_encoder": TEXT}, text_encoders=2)
    assert all(key.startswith("lora_te1_text_model_") for key in load_file(tmp_path / "two.safetensors"))


def test_peft_header_describes_each_component(tmp_path: Path) -> None:
    mixed = {**UNET, TO_Q: random_adapter(SHAPES["unet"], 3, rank=7, targets=("attn1.to_q",))[TO_Q]}
    write_lora(tmp_path / "a.safetensors", {"unet": mixed, "text_encoder": TEXT}, layout="peft")
    with open_tensors(tmp_path / "a.safetensors") as file:
        fields = json.loads(file.metadata["lora_adapter_metadata"])
        assert file.shape(f"unet.{TO_Q}.lora_A.weight") == (7, 8)
        assert file.shape("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight") == (32, 3)
    assert (fields["unet.r"], fields["unet.lora_alpha"], fields["text_encoder.r"]) == (4, 4, 3)
    assert fields["unet.rank_pattern"] == fields["unet.alpha_pattern"] == {TO_Q: 7}
    assert len(fields["unet.target_modules"]) == len(UNET)
    assert_same_delta(read_lora(tmp_path / "a.safetensors", SHAPES).adapters["unet"], mixed)


@pytest.mark.parametrize("alpha", [np.float32(2), np.float16(2), np.int64(2), np.float64(2), ml_dtypes.bfloat16(2)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_of_any_type_gives_the_scale(tmp_path: Path, alpha: Any, shape: tuple[int, ...]) -> None:
    tensors = kohya_tensors("lora_unet_", UNET, None)
    name = "lora_unet_" + TO_Q.replace(".", "_")
    save_file(tensors | {f"{name}.alpha": np.full(shape, alpha)}, tmp_path / "a.safetensors")
    loaded = read_lora(tmp_path / "a.safetensors", SHAPES)
    np.testing.assert_array_equal(loaded.adapters["unet"][TO_Q]["scale"], np.full(4, 0.5))
    others = {path: entry for path, entry in loaded.adapters["unet"].items() if path != TO_Q}
    assert_same_delta(others, {path: UNET[path] for path in others})  # no alpha: scale 1, whatever others state


@pytest.mark.parametrize(("prefix", "component"), [("lora_te_", 0), ("lora_te1_", 0), ("lora_te2_", 1)])
def test_text_encoder_prefixes(tmp_path: Path, prefix: str, component: int) -> None:
    name, adapter = (("text_encoder", TEXT), ("text_encoder_2", TEXT_2))[component]
    save_file(kohya_tensors(prefix, adapter, 6.0), tmp_path / "a.safetensors")
    loaded = read_lora(tmp_path / "a.safetensors", SHAPES)
    rank = 3 if component == 0 else 2
    assert_same_delta(loaded.adapters[name], scaled(adapter, 6.0 / rank))


def test_a_base_without_the_text_model_prefix_is_served_too(tmp_path: Path) -> None:
    shapes = {"text_encoder": {k.removeprefix("text_model."): v for k, v in SHAPES["text_encoder"].items()}}
    adapter = {path.removeprefix("text_model."): entry for path, entry in TEXT.items()}
    for layout in ("kohya", "peft"):
        write_lora(tmp_path / "a.safetensors", {"text_encoder": adapter}, layout=layout)
        assert all("text_model" in key for key in load_file(tmp_path / "a.safetensors"))
        assert_same_delta(read_lora(tmp_path / "a.safetensors", shapes).adapters["text_encoder"], adapter)
        assert_same_delta(read_lora(tmp_path / "a.safetensors", SHAPES).adapters["text_encoder"], TEXT)


def test_linear_factors_on_pointwise_convolutions_and_the_other_way_round(tmp_path: Path) -> None:
    proj_in = "mid_block.attentions.0.proj_in"  # a 1x1 convolution here
    down, up = torch_factors(UNET[proj_in])
    q_down, q_up = torch_factors(UNET[TO_Q])
    names = ["lora_unet_" + path.replace(".", "_") for path in (proj_in, TO_Q)]
    tensors = {
        f"{names[0]}.lora_down.weight": down[:, :, 0, 0],
        f"{names[0]}.lora_up.weight": up[:, :, 0, 0],
        f"{names[1]}.lora_down.weight": q_down[:, :, None, None],
        f"{names[1]}.lora_up.weight": q_up[:, :, None, None],
    }
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / "a.safetensors")
    loaded = read_lora(tmp_path / "a.safetensors", SHAPES).adapters["unet"]
    assert_same_delta(loaded, {path: UNET[path] for path in (proj_in, TO_Q)})


def test_peft_alpha_rules_from_the_header(tmp_path: Path) -> None:
    """The last path components select a pattern, the first pattern wins, and rsLoRA divides by the root of the rank."""
    fields = {
        "unet.r": 4,
        "unet.lora_alpha": 2,
        "unet.alpha_pattern": {"attn1.to_q": 12, "to_q": 20, r"down_blocks\.1\..*\.conv1": 6},
        "text_encoder.r": 9,
        "text_encoder.rank_pattern": {".*": 3},
        "text_encoder.lora_alpha": 6,
        "text_encoder.use_rslora": True,
    }
    tensors = dotted_tensors("unet.", UNET, ".lora_A.weight", ".lora_B.weight")
    tensors |= dotted_tensors("text_encoder.", TEXT, ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(fields)})
    loaded = read_lora(tmp_path / "a.safetensors", SHAPES)
    scales = {path: float(entry["scale"][0]) for path, entry in loaded.adapters["unet"].items()}
    assert scales[TO_Q] == 3
    assert scales[TO_Q.replace("attn1", "attn2")] == 5
    assert scales["down_blocks.1.resnets.0.conv1"] == 1.5
    assert scales["down_blocks.0.resnets.0.conv1"] == 0.5
    text = next(iter(loaded.adapters["text_encoder"].values()))
    np.testing.assert_allclose(text["scale"], np.full(3, 6 / 3**0.5), rtol=1e-6)
    assert loaded.report.alphas == (2, 20)


def test_a_header_without_alpha_means_peft_s_default_of_8(tmp_path: Path) -> None:
    tensors = dotted_tensors("unet.", UNET, ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps({"unet.r": 4})})
    assert read_lora(tmp_path / "a.safetensors", SHAPES).report.scales == (2.0, 2.0)


@pytest.mark.parametrize("text", [False, True])
def test_peft_folder(tmp_path: Path, text: bool) -> None:
    component, adapter = ("text_encoder_2", TEXT_2) if text else ("unet", UNET)
    tensors = dotted_tensors("base_model.model.", adapter, ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2 if text else 4, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        loaded = read_lora(path, SHAPES)
        assert_same_delta(loaded.adapters[component], scaled(adapter, 8.0 if text else 4.0))
        assert loaded.adapters.keys() == {component}


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ],
)
def test_dotted_layouts_without_alpha_have_scale_1(tmp_path: Path, down: str, up: str) -> None:
    tensors = dotted_tensors("unet.", UNET, down, up) | dotted_tensors("text_encoder.", TEXT, down, up)
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = read_lora(tmp_path / "a.safetensors", SHAPES)
    assert_same_delta(loaded.adapters["unet"], UNET)
    assert_same_delta(loaded.adapters["text_encoder"], TEXT)
    assert loaded.report.alphas is None


def test_attention_processor_names_of_2023(tmp_path: Path) -> None:
    attention = {path: entry for path, entry in UNET.items() if ".attn" in path}
    text = {path: entry for path, entry in TEXT.items() if ".self_attn." in path}

    def old(key: str) -> str:
        for new in ("q", "k", "v", "out"):
            key = key.replace(f".to_{new}.0|", f".processor.to_{new}_lora.").replace(
                f".to_{new}|", f".processor.to_{new}_lora."
            )
            key = key.replace(f".{new}_proj|", f".to_{new}_lora.")
        return key

    tensors = dotted_tensors("unet.", attention, "|down.weight", "|up.weight")
    tensors |= dotted_tensors("text_encoder.", text, "|down.weight", "|up.weight")
    save_file({old(key): value for key, value in tensors.items()}, tmp_path / "a.safetensors")
    loaded = read_lora(tmp_path / "a.safetensors", SHAPES)
    assert_same_delta(loaded.adapters["unet"], attention)
    assert_same_delta(loaded.adapters["text_encoder"], text)


def test_files_that_mix_layouts_lose_nothing(tmp_path: Path) -> None:
    """As the PEFT-style LCM script of diffusers writes them: attention one way, the rest another."""
    attention = {path: entry for path, entry in UNET.items() if ".attn" in path}
    rest = {path: entry for path, entry in UNET.items() if ".attn" not in path}
    tensors = dotted_tensors("unet.", attention, ".lora.down.weight", ".lora.up.weight")
    save_file(tensors | dotted_tensors("unet.", rest, ".lora_A.weight", ".lora_B.weight"), tmp_path / "a.safetensors")
    loaded = read_lora(tmp_path / "a.safetensors", SHAPES)
    assert_same_delta(loaded.adapters["unet"], UNET)
    assert loaded.report.layout == "PEFT+diffusers"


def test_the_report_is_one_line(tmp_path: Path) -> None:
    tensors = kohya_tensors("lora_unet_", UNET, 8.0, np.float16) | kohya_tensors("lora_te1_", TEXT, 8.0, np.float16)
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_dim": "4"})
    report = read_lora(tmp_path / "a.safetensors", SHAPES).report
    assert str(report) == (
        f"{tmp_path / 'a.safetensors'}: kohya LoRA, {len(UNET)} unet + {len(TEXT)} text_encoder modules, rank 3-4,"
        " alpha 8 (scale 2-2.66667), float16"
    )
    assert report.metadata == {"ss_network_dim": "4"}


def header_size(tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str] | None) -> int:
    """Bytes of a safetensors header by its own rules: larger types first, then by name, padded to 8 bytes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for key in sorted(tensors):
        dtype, shape, size = tensors[key]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8


def test_header_rules_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = kohya_tensors("lora_unet_", UNET, 4.0)
    described = {key: ("F32", value.shape, value.nbytes) for key, value in tensors.items()}
    for metadata in (None, {"format": "pt"}):
        save_file(tensors, tmp_path / "a.safetensors", metadata)
        expected = header_size(described, metadata) + sum(value.nbytes for value in tensors.values())
        assert (tmp_path / "a.safetensors").stat().st_size == expected


@pytest.mark.parametrize(
    ("family", "sizes"), [(SD15, {None: 269_127_064, "pt": 269_127_096}), (SDXL, {"pt": 787_359_648})]
)
def test_files_are_as_large_as_the_published_hyper_sd_loras(family: dict, sizes: dict[str | None, int]) -> None:
    """Names, ranks, types and alpha shapes of Hyper-SD15-{1,4}step(s)-lora and Hyper-SDXL-4steps-lora, to the byte."""
    shapes = adaptable_shapes({"unet": family["unet"]})["unet"]
    described = {}
    for path, kernel in ((p, shapes[p + ".kernel"].shape) for p in target_paths(shapes)):
        entry = {
            "down": np.broadcast_to(np.float32(0), (*kernel[:-1], 64)),
            "up": np.broadcast_to(np.float32(0), (64, kernel[-1])),
            "scale": np.ones(64, np.float32),
        }
        for key, value in kohya.encode("unet", {path: entry}, dtype=np.float32, text_encoders=1):
            described[key] = ("F32", value.shape, value.nbytes)
    data = sum(size for _, _, size in described.values())
    for form, expected in sizes.items():
        assert header_size(described, {"format": form} if form else None) + data == expected
