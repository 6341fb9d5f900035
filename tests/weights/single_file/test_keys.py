"""The names and shapes of the original files at full size, without a single weight."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypersd_jax.models.clip_text import ClipTextConfig
from hypersd_jax.models.unet import UNetConfig
from hypersd_jax.models.vae import VaeConfig
from hypersd_jax.weights import families
from hypersd_jax.weights.assembly import Description, Structure, networks
from hypersd_jax.weights.keys import torch_shape
from hypersd_jax.weights.single_file import keys
from hypersd_jax.weights.single_file.configs import component_configs, generation, prediction_type
from hypersd_jax.weights.single_file.model import locations_of
from hypersd_jax.weights.single_file.notes import settings_lost

FILE = Path("model.safetensors")
KINDS = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}
VAE_CONFIG = {
    **families.VAE,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


@cache
def structure(family: str) -> Structure:
    configs = families.FAMILIES[family]
    factor = families.SCALING_FACTORS[KINDS[family]]
    return Structure(
        unet=UNetConfig.from_dict(configs["unet"]),
        vae=VaeConfig.from_dict({**VAE_CONFIG, "scaling_factor": factor}),
        text={name: ClipTextConfig.from_dict(config) for name, config in configs.items() if name != "unet"},
    )


@cache
def layout(family: str) -> dict[str, tuple[int, ...]]:
    """{key of the single file: shape} of a whole model as it is written."""
    parts = structure(family)
    sizes = {}
    for name, network in networks(parts, dict.fromkeys(parts.components, np.float32)).items():
        for path, location in locations_of(name, network.shapes, parts, KINDS[family]).items():
            sizes[location.key] = location.shape(torch_shape(path, network.shapes[path].shape))
    return sizes


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        # The original file also holds the text encoder's position_ids, a buffer.
        ("sd15", {keys.UNET: 686, keys.VAE: 248, keys.CLIP: 196}),
        # OpenCLIP-H: 12 tensors a layer, two embeddings, the last norm; the 24th layer and the projection are left out.
        ("sd21", {keys.UNET: 686, keys.VAE: 248, keys.OPEN_CLIP: 23 * 12 + 4}),
        ("sdxl", {keys.UNET: 1680, keys.VAE: 248, keys.CLIP_XL: 196, keys.OPEN_CLIP_XL: 32 * 12 + 5}),
    ],
)
def test_how_many_tensors_each_part_has(family: str, counts: dict[str, int]) -> None:
    found = layout(family)
    assert {prefix: sum(key.startswith(prefix) for key in found) for prefix in counts} == counts
    assert len(found) == sum(counts.values())
    assert not any(keys.IGNORED.search(key) for key in found)
    assert all(keys.canonical(key) == key for key in found)


@pytest.mark.parametrize(
    ("family", "key", "shape"),
    [
        ("sd15", "model.diffusion_model.input_blocks.0.0.weight", (320, 4, 3, 3)),
        ("sd15", "model.diffusion_model.time_embed.2.weight", (1280, 1280)),
        ("sd15", "model.diffusion_model.input_blocks.1.1.proj_in.weight", (320, 320, 1, 1)),
        ("sd15", "model.diffusion_model.input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        ("sd15", "model.diffusion_model.input_blocks.4.0.skip_connection.weight", (640, 320, 1, 1)),
        ("sd15", "model.diffusion_model.input_blocks.11.0.out_layers.3.weight", (1280, 1280, 3, 3)),
        ("sd15", "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight", (1280, 768)),
        ("sd15", "model.diffusion_model.output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        ("sd15", "model.diffusion_model.output_blocks.5.2.conv.weight", (1280, 1280, 3, 3)),
        ("sd15", "model.diffusion_model.output_blocks.8.2.conv.weight", (640, 640, 3, 3)),
        ("sd15", "model.diffusion_model.output_blocks.11.0.skip_connection.weight", (320, 640, 1, 1)),
        ("sd15", "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight", (2560, 320)),
        ("sd15", "model.diffusion_model.out.2.weight", (4, 320, 3, 3)),
        ("sd15", "first_stage_model.encoder.down.2.block.0.nin_shortcut.weight", (512, 256, 1, 1)),
        ("sd15", "first_stage_model.encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("sd15", "first_stage_model.decoder.mid.attn_1.proj_out.weight", (512, 512, 1, 1)),
        ("sd15", "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight", (128, 256, 1, 1)),
        ("sd15", "first_stage_model.decoder.up.3.upsample.conv.weight", (512, 512, 3, 3)),
        ("sd15", "first_stage_model.encoder.norm_out.weight", (512,)),
        ("sd15", "first_stage_model.quant_conv.weight", (8, 8, 1, 1)),
        ("sd15", "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight", (3072, 768)),
        ("sd21", "model.diffusion_model.input_blocks.1.1.proj_in.weight", (320, 320)),
        ("sd21", "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight", (3072, 1024)),
        ("sd21", "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias", (3072,)),
        ("sd21", "cond_stage_model.model.positional_embedding", (77, 1024)),
        ("sd21", "cond_stage_model.model.ln_final.weight", (1024,)),
        ("sdxl", "model.diffusion_model.label_emb.0.0.weight", (1280, 2816)),
        ("sdxl", "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight", (1280, 2048)),
        ("sdxl", "model.diffusion_model.output_blocks.2.2.conv.weight", (1280, 1280, 3, 3)),
        ("sdxl", "model.diffusion_model.output_blocks.5.2.conv.weight", (640, 640, 3, 3)),
        ("sdxl", "model.diffusion_model.output_blocks.8.0.in_layers.2.weight", (320, 640, 3, 3)),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", (768,)),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.weight", (5120, 1280)),
        ("sdxl", "conditioner.embedders.1.model.text_projection", (1280, 1280)),
    ],
)
def test_well_known_tensors(family: str, key: str, shape: tuple[int, ...]) -> None:
    assert layout(family)[key] == shape


@pytest.mark.parametrize("family", KINDS)
def test_nothing_of_a_real_model_is_lost_on_other_programs(family: str) -> None:
    parts, kind = structure(family), KINDS[family]
    factor = {"scaling_factor": families.SCALING_FACTORS[kind]}
    prediction = "v_prediction" if kind == "sd2" else "epsilon"  # what other programs take such a file for
    description = Description(
        origin=FILE,
        configs={**families.FAMILIES[family], "vae": {**VAE_CONFIG, **factor}},
        scheduler_config={**families.SCHEDULERS[kind], "prediction_type": prediction},
        model_index=families.model_index("DDIMScheduler", xl=kind == "sdxl", inpainting=False),
        tokenizers={},
    )
    assert settings_lost(layout(family), description, parts, kind, FILE) == []


@pytest.mark.parametrize("family", KINDS)
def test_shapes_tell_the_structure(family: str) -> None:
    sizes, kind, wanted = layout(family), KINDS[family], structure(family)
    assert generation(sizes, FILE) == kind
    prediction = prediction_type(sizes, kind, {}, None, FILE)
    assert prediction == ("v_prediction" if kind == "sd2" else "epsilon")
    configs = component_configs(sizes, kind, FILE, prediction=prediction, given={})
    assert UNetConfig.from_dict(configs["unet"]) == wanted.unet
    assert VaeConfig.from_dict(configs["vae"]) == wanted.vae
    for name, config in wanted.text.items():
        assert ClipTextConfig.from_dict(configs[name]) == config, name


def test_the_original_files_hold_a_layer_more_than_sd2_reads() -> None:
    last = f"{keys.OPEN_CLIP}transformer.resblocks.23."
    more = {
        last + key.split("resblocks.22.")[1]: size for key, size in layout("sd21").items() if "resblocks.22." in key
    }
    for extra in ({}, {f"{keys.OPEN_CLIP}text_projection": (1024, 1024)}):
        for sizes in ({**layout("sd21"), **more, **extra}, {**layout("sd21"), **extra}):
            configs = component_configs(sizes, "sd2", FILE, prediction="v_prediction", given={})
            assert configs["text_encoder"]["num_hidden_layers"] == 23


def test_uneven_transformers_and_a_middle_without_one() -> None:
    """As in SDXL's distilled relatives: other depths on the way back, other numbers of layers."""
    config: dict[str, Any] = {
        **families.FAMILIES["sdxl"]["unet"],
        "layers_per_block": [1, 2, 1],
        "transformer_layers_per_block": [[1], [2, 3], [4]],
        "reverse_transformer_layers_per_block": [[4, 1], [1, 1, 2], [1, 1]],
        "mid_block_type": "UNetMidBlock2D",
    }
    parts = structure("sdxl")
    uneven = Structure(unet=UNetConfig.from_dict(config), vae=parts.vae, text=parts.text)
    sizes = {key: size for key, size in layout("sdxl").items() if not key.startswith(keys.UNET)}
    network = networks(uneven, dict.fromkeys(uneven.components, np.float32))["unet"]
    for path, location in locations_of("unet", network.shapes, uneven, "sdxl").items():
        sizes[location.key] = location.shape(torch_shape(path, network.shapes[path].shape))
    found = component_configs(sizes, "sdxl", FILE, prediction="epsilon", given={})
    assert (
        networks(
            Structure(unet=UNetConfig.from_dict(found["unet"]), vae=parts.vae, text=parts.text),
            dict.fromkeys(uneven.components, np.float32),
        )["unet"].shapes
        == network.shapes
    )
