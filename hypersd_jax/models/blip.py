"""BLIP's image-grounded text encoder (Li et al. 2022, arXiv:2201.12086), as ImageReward reads image and prompt."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hypersd_jax.models.bert import BertConfig, BertEncoder
from hypersd_jax.models.blip_vision import BlipVisionConfig, VisionEncoder
from hypersd_jax.models.functional import Network, describe

PADDING = 0
"""The token id that fills prompts up and is not seen."""


class Blip(nnx.Module):
    """Normalised images (B, S, S, 3) and ids (B, L) to the state of the first token (B, D)."""

    def __init__(self, vision: BlipVisionConfig, text: BertConfig, *, dtype: Any) -> None:
        self.visual_encoder = VisionEncoder(vision, dtype=dtype)
        self.text_encoder = BertEncoder(text, dtype=dtype)

    def __call__(self, pixels: jax.Array, ids: jax.Array) -> jax.Array:
        """Encode the texts, each looking at its image."""
        return self.text_encoder(ids, ids != PADDING, self.visual_encoder(pixels))[:, 0]


def blip(vision: BlipVisionConfig, text: BertConfig, *, dtype: Any = jnp.float32) -> Network:
    """The encoder as a `Network`: `network(params, pixels (B, S, S, 3), ids (B, L) int32) -> (B, D)`.

    Args:
        vision: sizes of the image encoder.
        text: sizes of the text encoder.
        dtype: of parameters and computation; norms and softmax are float32 whatever it is.
    """
    return describe(Blip, vision, text, dtype=dtype)
