"""A tiny random SDXL-shaped model folder, written without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from hypersd_jax.models.clip_text import ClipTextConfig, clip_text
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.weights.diffusers.component import save_params
from tests.helpers import tiny_model as tiny
from tests.helpers.tiny_model import tiny_model


def tiny_xl(folder: Path) -> Path:
    """An SDXL-shaped model of 16 px: two text encoders, text_time conditioning, zeros as unconditional."""
    tiny_model(folder)
    width = tiny.TEXT["hidden_size"]
    text = {**tiny.TEXT, "num_hidden_layers": 2}
    text_2 = {**text, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "projection_dim": 8}
    added = {
        **tiny.UNET,
        "cross_attention_dim": 2 * width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    }
    for name, network, config, kind in (
        ("unet", unet(UNetConfig.from_dict(added), dtype=jnp.float32), added, "unet"),
        ("text_encoder", _text(text, projection=False), text, "clip"),
        ("text_encoder_2", _text(text_2, projection=True), text_2, "clip"),
    ):
        for old in (folder / name).glob("*"):
            old.unlink()
        # The UNet's weights are larger, so that what conditions it matters more.
        params = network.init(len(name), gain=2.0 if kind == "unet" else 1.0)
        save_params(folder / name, params, config=config, component_kind=kind)
    (folder / "tokenizer_2").symlink_to(folder / "tokenizer")
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _text(config: dict[str, Any], *, projection: bool) -> Any:
    return clip_text(ClipTextConfig.from_dict(config), dtype=jnp.float32, projection=projection)
