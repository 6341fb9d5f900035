"""Configurations of the families' networks, as `config.json` has them, and of tiny networks of the same structure.

Imports neither JAX's arrays nor PyTorch's: each side of a benchmark builds its own networks from them.
"""

from __future__ import annotations

import json
from typing import Any

from hypersd_jax.weights.components import assets
from hypersd_jax.weights.families import FAMILIES, VAE

NAMES = ("sd15", "sdxl")
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SCALING_FACTORS = {"sd15": 0.18215, "sdxl": 0.13025}
PIXELS = {"sd15": 512, "sdxl": 1024}

Configs = dict[str, dict[str, Any]]


def model_configs(family: str, *, tiny: bool = False) -> Configs:
    """Return the configurations of a family's networks by component: UNet, autoencoder and text encoders.

    Args:
        family: ``sd15`` or ``sdxl``.
        tiny: shrink widths and depths, for a benchmark's own test; kinds of blocks and of conditioning stay.
    """
    ids = special_ids()
    configs = {name: {**config} for name, config in FAMILIES[family].items()}
    configs["unet"] = {name: value for name, value in configs["unet"].items() if not name.startswith("_")}
    for name in text_encoders(configs):
        configs[name] |= ids
    levels = [128, 256, 512, 512]
    configs["vae"] = {
        **VAE,
        "block_out_channels": levels,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": 2,
        "sample_size": PIXELS[family],
        "scaling_factor": SCALING_FACTORS[family],
        "force_upcast": False,
    }
    return _tiny(configs) if tiny else configs


def special_ids() -> dict[str, int]:
    """Return the first and last token's ids of the embedded model's tokenizer, which random models share."""
    config = json.loads((assets() / "teacher" / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    return {name: config[name] for name in ("bos_token_id", "eos_token_id")}


def text_encoders(configs: Configs) -> list[str]:
    """Return the names of the text encoders among the components."""
    return [name for name in configs if name.startswith("text_encoder")]


def _tiny(configs: Configs) -> Configs:
    """Two levels, the last kinds of blocks down and the first ones up, on images of 16 px."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    names, found = text_encoders(configs), {name: {**config} for name, config in configs.items()}
    for name in names:
        found[name] |= {**text, "projection_dim": 16, "vocab_size": found[name]["eos_token_id"] + 1}
    unet = found["unet"]
    unet |= {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": text["hidden_size"] * len(names),
        "sample_size": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    if "projection_class_embeddings_input_dim" in unet:
        unet |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 16}
        unet["transformer_layers_per_block"] = [1, 2]
    found["vae"] |= {
        "block_out_channels": [32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "sample_size": 16,
    }
    return found
