"""LoRA files across the border: ours loaded by diffusers, and those of diffusers and PEFT loaded by us."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from hypersd_jax.adapters import Adapter, concatenate, delta, merge, pad, scaled
from hypersd_jax.models.clip_text import ClipTextConfig, clip_text
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.weights import read_lora, write_lora
from tests.helpers.configs import TINY_TEXT, TINY_UNET
from tests.helpers.lora_files import TEXT_TARGETS, random_adapter
from tests.helpers.torch_weights import perturb, relative_error, to_ours

NETS = {
    "unet": unet(UNetConfig.from_dict(TINY_UNET), dtype=jnp.float32),
    "text_encoder": clip_text(ClipTextConfig.from_dict(TINY_TEXT), dtype=jnp.float32, projection=False),
}
SHAPES = {name: net.shapes for name, net in NETS.items()}
RNG = np.random.default_rng(0)
SAMPLE = RNG.normal(size=(2, 8, 8, 4)).astype(np.float32)
CONTEXT = RNG.normal(size=(2, 5, 16)).astype(np.float32)
TIMES = np.array([999, 19], np.int32)
IDS = np.array([[97, 3, 4, 98, 98, 98], [97, 7, 98, 98, 98, 98]], np.int32)

TIGHT = 1e-5
"""Relative L2 error of float32 outputs; what is measured is 1e-6 or less."""


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    """A UNet and a text encoder of diffusers and transformers with random weights, never changed by a test."""
    torch.manual_seed(0)
    return {
        "unet": perturb(diffusers.UNet2DConditionModel.from_config(TINY_UNET), 1),
        "text_encoder": perturb(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TINY_TEXT)), 2),
    }


@pytest.fixture(scope="module")
def params(modules: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: our_params(modules[name], SHAPES[name]) for name in modules}


@pytest.fixture
def pipe(modules: dict[str, Any]) -> Any:
    parts = {name: copy.deepcopy(module) for name, module in modules.items()}
    return diffusers.StableDiffusionPipeline(
        **parts,
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        tokenizer=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def torch_name(module: Any, path: str) -> str:
    """Our path as this release of transformers spells it: CLIPTextModel has lost its `text_model.` prefix."""
    return path if hasattr(module, "text_model") else path.removeprefix("text_model.")


def our_params(module: Any, shapes: Mapping[str, Any]) -> dict[str, Any]:
    theirs = dict(module.named_parameters())
    names = {path: torch_name(module, path).rpartition(".") for path in shapes}
    return {
        path: jnp.asarray(to_ours(path, theirs[f"{stem}.{'bias' if leaf == 'bias' else 'weight'}"]))
        for path, (stem, _, leaf) in names.items()
    }


def torch_outputs(parts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        image = torch.from_numpy(SAMPLE.transpose(0, 3, 1, 2))
        out = parts["unet"](image, torch.from_numpy(TIMES), torch.from_numpy(CONTEXT)).sample
        text = parts["text_encoder"](torch.from_numpy(IDS).long()).last_hidden_state
    return {"unet": out.numpy().transpose(0, 2, 3, 1), "text_encoder": text.numpy()}


def our_outputs(params: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> dict[str, np.ndarray]:
    out = NETS["unet"](params["unet"], SAMPLE, TIMES, CONTEXT, adapter=adapters.get("unet"))
    text = NETS["text_encoder"](params["text_encoder"], IDS, adapter=adapters.get("text_encoder")).last
    return {"unet": np.asarray(out), "text_encoder": np.asarray(text)}


def merged_by_hand(modules: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """PyTorch modules whose weights have the deltas added, without any LoRA code of theirs."""
    merged = {}
    for name, module in modules.items():
        merged[name] = copy.deepcopy(module)
        for path, entry in adapters.get(name, {}).items():
            weight = merged[name].get_submodule(torch_name(module, path)).weight
            change = np.asarray(delta(entry))
            change = change.transpose(3, 2, 0, 1) if change.ndim == 4 else change.T
            weight.data += torch.from_numpy(np.ascontiguousarray(change))
    return merged


def assert_all_close(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> None:
    for name in second:
        assert relative_error(first[name], second[name]) < TIGHT, name


def assert_all_differ(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> None:
    for name in second:
        assert relative_error(first[name], second[name]) > 1e-2, name


def our_adapters(seed: int, scale: float) -> dict[str, Adapter]:
    """Ranks 4 and 7 in the UNet, 3 in the text encoder."""
    common = random_adapter(SHAPES["unet"], seed, scale=scale)
    others = random_adapter(SHAPES["unet"], seed, scale=scale, rank=7, targets=("attn2.to_q", "resnets.1.conv1"))
    text = random_adapter(SHAPES["text_encoder"], seed, scale=scale, rank=3, targets=TEXT_TARGETS)
    return {"unet": common | others, "text_encoder": text}


def diffusers_lora(modules: Mapping[str, Any], folder: Path, seed: int, **options: Any) -> dict[str, Any]:
    """Adds PEFT adapters to copies, saves them through diffusers, and returns the adapted copies."""
    torch.manual_seed(seed)
    parts = {name: copy.deepcopy(module) for name, module in modules.items()}
    configs = {
        "unet": peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "downsamplers.0.conv"],
            rank_pattern={"attn2.to_q": 7, "mid_block.resnets.0.conv1": 2},
            alpha_pattern={"attn2.to_q": 3, "ff.net.2": 1},
            init_lora_weights=False,
            **options,
        ),
        "text_encoder": peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=["q_proj", "fc1"], init_lora_weights=False, **options
        ),
    }
    for name, part in parts.items():
        part.add_adapter(configs[name])
    state = {name: peft.get_peft_model_state_dict(part) for name, part in parts.items()}
    fields = {f"{name}_lora_adapter_metadata": part.peft_config["default"].to_dict() for name, part in parts.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=state["unet"], text_encoder_lora_layers=state["text_encoder"], **fields
    )
    return parts


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_diffusers_loads_what_we_write(
    tmp_path: Path, modules: dict[str, Any], params: dict[str, Any], pipe: Any, layout: str
) -> None:
    adapters = our_adapters(10, scale=0.3)
    write_lora(tmp_path / "ours.safetensors", adapters, layout=layout)
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    theirs = torch_outputs({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    assert_all_close(theirs, torch_outputs(merged_by_hand(modules, adapters)))
    assert_all_close(our_outputs(params, adapters), theirs)
    assert_all_close(our_outputs({name: merge(params[name], adapters[name]) for name in params}, {}), theirs)
    assert_all_differ(theirs, our_outputs(params, {}))


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_both_text_encoders_of_sdxl_are_found(tmp_path: Path, modules: dict[str, Any], layout: str) -> None:
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(**TINY_TEXT)
    parts = {**modules, "text_encoder_2": transformers.CLIPTextModelWithProjection(config).eval()}
    pipe = diffusers.StableDiffusionXLPipeline(
        **{name: copy.deepcopy(part) for name, part in parts.items()},
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        tokenizer=None,
        tokenizer_2=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    )
    adapters = our_adapters(40, scale=0.3)
    adapters["text_encoder_2"] = random_adapter(SHAPES["text_encoder"], 50, rank=2, targets=TEXT_TARGETS)
    write_lora(tmp_path / "ours.safetensors", adapters, layout=layout)
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    merged = merged_by_hand(parts, adapters)
    for name in ("text_encoder", "text_encoder_2"):
        with torch.no_grad():
            theirs, ours, before = (
                source[name](torch.from_numpy(IDS).long())[0] for source in (pipe.components, merged, parts)
            )
        assert relative_error(theirs, ours) < TIGHT, name
        assert relative_error(theirs, before) > 1e-2, name


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_we_load_what_diffusers_writes(
    tmp_path: Path, modules: dict[str, Any], params: dict[str, Any], options: dict[str, Any]
) -> None:
    """lora_alpha other than r, patterns of both, and convolutions; the module names are those of this transformers."""
    theirs = torch_outputs(diffusers_lora(modules, tmp_path, 0, **options))
    loaded = read_lora(tmp_path / "pytorch_lora_weights.safetensors", SHAPES)
    assert loaded.report.ranks == (2, 7)
    ours = our_outputs(params, loaded.adapters)
    assert_all_close(ours, theirs)
    assert_all_differ(ours, torch_outputs(modules))
    halved = {name: scaled(adapter, 0.5) for name, adapter in loaded.adapters.items()}
    assert_all_differ(our_outputs(params, halved), ours)


def test_we_load_a_peft_folder(tmp_path: Path, modules: dict[str, Any], params: dict[str, Any]) -> None:
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4, target_modules=["to_k", "conv2"], alpha_pattern={"attn1.to_k": 2}, init_lora_weights=False
    )
    model = peft.get_peft_model(copy.deepcopy(modules["unet"]), config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 8
    loaded = read_lora(tmp_path, SHAPES)
    assert loaded.report.alphas == (2, 8)
    theirs = torch_outputs({"unet": model, "text_encoder": modules["text_encoder"]})
    assert_all_close(our_outputs(params, loaded.adapters), theirs)


def test_two_loras_with_their_own_scales(
    tmp_path: Path, modules: dict[str, Any], params: dict[str, Any], pipe: Any
) -> None:
    first = our_adapters(20, scale=0.5)
    write_lora(tmp_path / "first.safetensors", first)
    diffusers_lora(modules, tmp_path, 3)
    second = read_lora(tmp_path / "pytorch_lora_weights.safetensors", SHAPES).adapters
    pipe.load_lora_weights(tmp_path, weight_name="first.safetensors", adapter_name="a")
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.7, -0.3])
    both = {name: pad(concatenate([scaled(first[name], 0.7), scaled(second[name], -0.3)])) for name in first}
    ours = our_outputs(params, both)
    assert_all_close(ours, torch_outputs({"unet": pipe.unet, "text_encoder": pipe.text_encoder}))
    assert_all_close(ours, torch_outputs(merged_by_hand(modules, both)))
    assert_all_differ(ours, our_outputs(params, {name: scaled(first[name], 0.7) for name in first}))


def test_modules_without_alpha_keep_scale_1_beside_modules_with_one(
    tmp_path: Path, modules: dict[str, Any], params: dict[str, Any]
) -> None:
    """diffusers gives the modules without alpha the others' alpha, so the truth here is weights merged by hand."""
    from safetensors.numpy import load_file, save_file

    adapters = {"unet": random_adapter(SHAPES["unet"], 30)}
    write_lora(tmp_path / "whole.safetensors", adapters)
    tensors = load_file(tmp_path / "whole.safetensors")
    halves = {key for key in tensors if key.endswith(".alpha") and "attn1" in key}
    mixed = {
        key: np.float32(2) if key in halves else value
        for key, value in tensors.items()
        if key in halves or not key.endswith(".alpha")
    }
    save_file({key: np.asarray(value) for key, value in mixed.items()}, tmp_path / "mixed.safetensors")
    loaded = read_lora(tmp_path / "mixed.safetensors", SHAPES).adapters
    factor = {path: 0.5 if "attn1" in path else 1.0 for path in adapters["unet"]}
    expected = {path: scaled({path: entry}, factor[path])[path] for path, entry in adapters["unet"].items()}
    assert_all_close(our_outputs(params, loaded), torch_outputs(merged_by_hand(modules, {"unet": expected})))
