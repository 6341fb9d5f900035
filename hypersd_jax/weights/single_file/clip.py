"""The structure of a CLIP whose safetensors file comes without config.json, from the shapes of its tensors."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

from hypersd_jax.errors import UserError
from hypersd_jax.weights.tensors import TensorFile

HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Attention heads by width of the published vision towers: B, L, H, g and G."""

TEXT_HEAD = 64
"""Width of a head in every published text tower."""

OPENAI_WIDTHS = (768, 1024)


def guess_config(file: TensorFile) -> dict[str, Any]:
    """Guess the `config.json` of this file.

    No tensor shows heads and activation. A file as wide as OpenAI's models is taken for one of theirs (`quick_gelu`), a
    larger one for OpenCLIP's (`gelu`), and a warning says so: of some widths there are both.

    Raises:
        UserError: it holds no CLIP of transformers' names, or one of a width that was never published.
    """
    keys = set(file.keys())

    def shape(key: str, axes: int) -> tuple[int, ...]:
        if key not in keys or len(file.shape(key)) != axes:
            raise UserError(f"{file.path}: holds no CLIPModel (no {key} of {axes} axes)")
        return file.shape(key)

    def layers(tower: str) -> int:
        return next(n for n in itertools.count() if f"{tower}.encoder.layers.{n}.mlp.fc1.weight" not in keys)

    width, _, patch, _ = shape("vision_model.embeddings.patch_embedding.weight", 4)
    vocabulary, text_width = shape("text_model.embeddings.token_embedding.weight", 2)
    if width not in HEADS:
        raise UserError(f"{file.path}: has no config.json beside it, and no known CLIP is {width} wide")
    activation = "quick_gelu" if width in OPENAI_WIDTHS else "gelu"
    patches = shape("vision_model.embeddings.position_embedding.weight", 2)[0] - 1
    warnings.warn(
        f"{file.path}: no config.json beside it; read as a vision tower {width} wide of {HEADS[width]} heads, "
        f"hidden_act {activation}",
        stacklevel=4,
    )
    return {
        "projection_dim": shape("visual_projection.weight", 2)[0],
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
            "num_hidden_layers": layers("text_model"),
            "num_attention_heads": max(text_width // TEXT_HEAD, 1),
            "max_position_embeddings": shape("text_model.embeddings.position_embedding.weight", 2)[0],
            "hidden_act": activation,
        },
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
            "num_hidden_layers": layers("vision_model"),
            "num_attention_heads": HEADS[width],
            "image_size": patch * math.isqrt(max(patches, 0)),
            "patch_size": patch,
            "hidden_act": activation,
        },
    }
