"""CLIP's vision tower: a ViT of any size (Radford et al. 2021, arXiv:2103.00020) with the projection into joint space.

As with the text tower, OpenAI's (`quick_gelu`) and OpenCLIP's (exact `gelu`) differ in `config.json` only. Attribute
paths are those of transformers' `CLIPVisionModelWithProjection`, the spelling of `pre_layrnorm` included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hypersd_jax.errors import UserError
from hypersd_jax.models.clip_text import Encoder, TowerConfig, read_tower
from hypersd_jax.models.config_reading import LARGEST, require
from hypersd_jax.models.execution import Execution
from hypersd_jax.models.functional import Network, describe
from hypersd_jax.models.layers import Conv, Embedding, LayerNorm, Linear, parameter

NAME = "CLIPVisionModel"
CHANNELS = 3
SIZES = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig(TowerConfig):
    """The keys of a `vision_config` that shape the network; the defaults are those of transformers, a B/32.

    Attributes:
        image_size: side of the square images that it reads, in pixels.
        patch_size: side of a patch; what is left over at the right and lower edge is not read.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ClipVisionConfig:
        """Read a `vision_config`; UserError names a key whose value cannot be honoured."""
        require({"num_channels": config.get("num_channels") or CHANNELS}, NAME, {"num_channels": (CHANNELS,)})
        found = cls(**read_tower(cls, config, name=NAME, model_type="clip_vision_model", sizes=SIZES))
        if found.patch_size > found.image_size:
            raise UserError(
                f"{NAME} config: patch_size={found.patch_size} is larger than image_size={found.image_size}"
            )
        if found.positions > LARGEST:
            raise UserError(f"{NAME} config: image_size and patch_size make {found.positions} tokens")
        return found

    @property
    def positions(self) -> int:
        """Tokens: one for each patch, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


class VisionOutput(NamedTuple):
    """Outputs of the image tower, T tokens of width D.

    Attributes:
        last: (B, T, D) the last hidden state, the class token first; without the final norm, as in transformers.
        pooled: (B, D) the class token after the final norm.
        projected: (B, P) `pooled` in the joint space, of any length.
    """

    last: jax.Array
    pooled: jax.Array
    projected: jax.Array


class Embeddings(nnx.Module):
    """Patches and the class token plus positions: (B, S, S, 3) to (B, T, D)."""

    def __init__(self, config: ClipVisionConfig, *, dtype: Any) -> None:
        width, patch = config.hidden_size, config.patch_size
        self.pixels = (config.image_size, config.image_size, CHANNELS)
        self.positions = config.positions
        self.dtype = dtype
        self.class_embedding = parameter((width,), dtype)
        self.patch_embedding = Conv(CHANNELS, width, patch, stride=patch, bias=False, dtype=dtype)
        self.position_embedding = Embedding(config.positions, width, dtype=dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Embed normalised images; ValueError where they are not of the size that there are positions for."""
        if pixels.shape[1:] != self.pixels:
            raise ValueError(f"images of shape {pixels.shape[1:]}, but the vision tower reads {self.pixels}")
        patches = self.patch_embedding(pixels.astype(self.dtype))
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...][None, None], (patches.shape[0], 1, patches.shape[2]))
        x = jnp.concatenate([first.astype(self.dtype), patches], axis=1)
        return x + self.position_embedding(jnp.arange(self.positions))[None].astype(self.dtype)


class VisionTransformer(nnx.Module):
    """Embeddings, a norm before the layers, the layers, and a norm of the class token."""

    def __init__(self, config: ClipVisionConfig, *, dtype: Any) -> None:
        self.embeddings = Embeddings(config, dtype=dtype)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.encoder = Encoder(config, causal=False, how=Execution(dtype=jnp.dtype(dtype)))
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map images (B, S, S, 3) to the last hidden state and the pooled vector."""
        last, _ = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return last, self.post_layernorm(last[:, 0])


class ClipVision(nnx.Module):
    """The vision tower: normalised images (B, S, S, 3) to `VisionOutput`."""

    def __init__(self, config: ClipVisionConfig, *, dtype: Any) -> None:
        self.vision_model = VisionTransformer(config, dtype=dtype)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False, dtype=dtype)

    def __call__(self, pixels: jax.Array) -> VisionOutput:
        """The size that is read, `image_size` pixels a side."""
        last, pooled = self.vision_model(pixels)
        return VisionOutput(last=last, pooled=pooled, projected=self.visual_projection(pooled))


def clip_vision(config: ClipVisionConfig, *, dtype: Any = jnp.float32) -> Network:
    """The vision tower as a `Network`: `network(params, pixels (B, S, S, 3)) -> VisionOutput`.

    Args:
        config: the tower's own configuration.
        dtype: of parameters and computation; norms and softmax are float32 whatever it is.
    """
    return describe(ClipVision, config, dtype=dtype)
