"""A tiny random model folder in diffusers' layout, written without PyTorch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from hypersd_jax.models.clip_text import ClipTextConfig, clip_text
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.models.vae import VaeConfig, vae
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.diffusers.component import save_params

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    # One level, with attention in the middle alone: every kind of layer but those between levels is there, and it
    # compiles in a quarter of the time.
    "block_out_channels": [16],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
    "mid_block_add_attention": False,
    "scaling_factor": 0.2,
}
TEXT: dict[str, Any] = {
    "model_type": "clip_text_model",
    "architectures": ["CLIPTextModel"],
    "vocab_size": 2274,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "hidden_act": "quick_gelu",
    "bos_token_id": 2272,
    "eos_token_id": 2273,
    "pad_token_id": 2273,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def tiny_model(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write a 16 px model of some 100,000 parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, network, config, kind in (
        ("unet", unet(UNetConfig.from_dict(UNET), dtype=jnp.float32), UNET, "unet"),
        ("vae", vae(VaeConfig.from_dict(VAE), dtype=jnp.float32), VAE, "vae"),
        (
            "text_encoder",
            clip_text(ClipTextConfig.from_dict(TEXT), dtype=jnp.float32, projection=False),
            TEXT,
            "clip",
        ),
    ):
        save_params(folder / name, network.init(0), config=config, component_kind=kind)
    shutil.copytree(assets() / "teacher" / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    _write(folder / "scheduler" / "scheduler_config.json", {**SCHEDULER, "prediction_type": prediction_type})
    _write(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    return folder


def smaller(folder: Path, *, middle: bool = False) -> Path:
    """A tiny model with the least of a UNet: a step holds up to a dozen of them.

    Its weights are larger, so that prompts matter more. Its attention is in the block down, or in one in the middle,
    which discriminators look at.
    """
    name = folder / "unet" / "config.json"
    config = {
        **json.loads(name.read_text()),
        "down_block_types": ["DownBlock2D" if middle else "CrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else None,
    }
    network = unet(UNetConfig.from_dict(config), dtype=jnp.float32)
    for old in name.parent.glob("*"):
        old.unlink()
    save_params(name.parent, network.init(0, gain=2.0), config=config, component_kind="unet")
    return folder


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
