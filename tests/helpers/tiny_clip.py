"""A tiny random CLIP in transformers' folder layout, written without PyTorch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_jax.models.clip_text import clip_text
from hypersd_jax.models.clip_vision import clip_vision
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.diffusers.clip import read_configs
from hypersd_jax.weights.keys import to_torch, torch_key
from hypersd_jax.weights.tensors import save_tensors

CONFIG: dict[str, Any] = {
    "model_type": "clip",
    "projection_dim": 6,
    "text_config": {
        "model_type": "clip_text_model",
        "vocab_size": 2274,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "eos_token_id": 2273,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 4,
    },
}


def tiny_tensors(config: dict[str, Any] = CONFIG) -> dict[str, np.ndarray]:
    """Random tensors under transformers' names, norms and biases included, of a size that makes scores differ."""
    text, vision = read_configs(config)
    rng = np.random.default_rng(0)
    tensors = {"logit_scale": np.float32(4.6)}
    for network in (clip_text(text, projection=True), clip_vision(vision)):
        for path, leaf in network.shapes.items():
            values = 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)
            tensors[torch_key(path)] = to_torch(path, 1 + values if path.endswith("scale") else values)
    return tensors


def tiny_clip(folder: Path) -> Path:
    """Write a CLIP for images of 12 px with the embedded tokenizer."""
    shutil.copytree(assets() / "teacher" / "tokenizer", folder)
    save_tensors(folder / "model.safetensors", tiny_tensors(), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder
