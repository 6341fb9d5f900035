"""The structure of a CLIP without transformers' config.json: from OpenCLIP's configuration, or from tensors' shapes."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

from hypersd_jax.errors import UserError, shown
from hypersd_jax.models.clip_text import LEGACY_EOS
from hypersd_jax.models.config_reading import natural, number, with_defaults
from hypersd_jax.weights.single_file.keys import Stored, is_open_clip, open_clip_place
from hypersd_jax.weights.tensors import TensorFile

HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Attention heads by width of the published vision towers: B, L, H, g and G."""

TEXT_HEAD = 64
"""Width of a head in every published text tower."""

OPENAI_WIDTHS = (768, 1024)


def guess_config(file: TensorFile, activation: str | None = None) -> dict[str, Any]:
    """Guess the `config.json` of this file, of transformers' names or of OpenCLIP's.

    No tensor shows heads and activation. A file as wide as OpenAI's models is taken for one of theirs (`quick_gelu`), a
    larger one for OpenCLIP's (`gelu`), and a warning says so: of some widths there are both.

    Args:
        file: the open file.
        activation: the `hidden_act` where it is known, so that none is guessed.

    Raises:
        UserError: it holds no CLIP, or one of a width that was never published.
    """
    keys = set(file.keys())
    spell = open_clip_place if is_open_clip(keys) else Stored.named

    def shape(key: str, axes: int) -> tuple[int, ...]:
        stored = spell(key)
        if stored.key not in keys or len(file.shape(stored.key)) != axes:
            raise UserError(f"{file.path}: holds no CLIPModel (no {stored.key} of {axes} axes)")
        found = file.shape(stored.key)
        return found[::-1] if stored.transposed else found

    def layers(tower: str) -> int:
        fc1 = f"{tower}.encoder.layers.{{}}.mlp.fc1.weight"
        return next(n for n in itertools.count() if spell(fc1.format(n)).key not in keys)

    width, _, patch, _ = shape("vision_model.embeddings.patch_embedding.weight", 4)
    vocabulary, text_width = shape("text_model.embeddings.token_embedding.weight", 2)
    if width not in HEADS:
        raise UserError(f"{file.path}: has no config.json beside it, and no known CLIP is {width} wide")
    patches = shape("vision_model.embeddings.position_embedding.weight", 2)[0] - 1
    if activation is None:
        activation = "quick_gelu" if width in OPENAI_WIDTHS else "gelu"
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


def from_open_clip(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an `open_clip_config.json` into the `config.json` that transformers would write.

    Raises:
        UserError: naming a key that asks for another sort of tower.
    """
    name = "open_clip"
    model = with_defaults(_object(values, "model_cfg"), _MODEL, name)
    vision = with_defaults(_object(model, "vision_cfg"), _VISION, name)
    text = with_defaults(_object(model, "text_cfg"), _TEXT, name)
    for part in (vision, text):
        for key in ("width", "layers"):
            natural(part, name, key)
    natural(vision, name, "head_width")
    activation = "quick_gelu" if model["quick_gelu"] is True else "gelu"
    return {
        "projection_dim": model["embed_dim"],
        "text_config": {
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * number(text, name, "mlp_ratio", positive=True)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "eos_token_id": LEGACY_EOS,
            "hidden_act": activation,
        },
        "vision_config": {
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * number(vision, name, "mlp_ratio", positive=True)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": max(vision["width"] // vision["head_width"], 1),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": activation,
        },
    }


# OpenCLIP's own defaults; further keys ask for other towers.
_MODEL = {"embed_dim": None, "vision_cfg": None, "text_cfg": None, "quick_gelu": False}
_VISION = {"width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
_TEXT = {"width": 512, "layers": 12, "heads": 8, "mlp_ratio": 4.0, "context_length": 77, "vocab_size": 49408}


def _object(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    if not isinstance(found, dict):
        raise UserError(f"open_clip config: {key}={shown(found)} is not an object")
    return found
