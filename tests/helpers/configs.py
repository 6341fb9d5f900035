"""The public model families as `config.json` contents, and a tiny model that has every kind of adapted module."""

from __future__ import annotations

from typing import Any

from hypersd_jax.weights.families import FAMILIES

SD15, SD21, SDXL = (FAMILIES[name] for name in ("sd15", "sd21", "sdxl"))

TINY_UNET: dict[str, Any] = {
    **SD15["unet"],
    "attention_head_dim": 2,
    "block_out_channels": [8, 16],
    "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}

TINY_TEXT: dict[str, Any] = {
    **SD15["text_encoder"],
    "bos_token_id": 97,
    "eos_token_id": 98,
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 98,
    "projection_dim": 16,
    "vocab_size": 99,
}

TINY: dict[str, dict[str, Any]] = {"unet": TINY_UNET, "text_encoder": TINY_TEXT}
TINY_XL: dict[str, dict[str, Any]] = {**TINY, "text_encoder_2": {**TINY_TEXT, "hidden_size": 24}}
