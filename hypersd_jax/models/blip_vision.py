"""BLIP's image encoder (Li et al. 2022, arXiv:2201.12086): a ViT with q, k and v in one projection.

Attribute paths are those of the authors' files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hypersd_jax.models.dot_product import attention
from hypersd_jax.models.layers import Conv, LayerNorm, Linear, activation, parameter

CHANNELS = 3
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class BlipVisionConfig:
    """Sizes of the encoder; the defaults are the ViT-L/16 of 224 px that ImageReward has.

    Attributes:
        image_size: side of the square images that it reads, in pixels; a multiple of `patch_size`.
    """

    width: int = 1024
    inner: int = 4096
    layers: int = 24
    heads: int = 16
    image_size: int = 224
    patch_size: int = 16

    @property
    def positions(self) -> int:
        """Tokens: one for each patch, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


class PatchEmbed(nnx.Module):
    """Images (B, S, S, 3) to patches (B, h, w, D)."""

    def __init__(self, config: BlipVisionConfig, *, dtype: Any) -> None:
        self.proj = Conv(CHANNELS, config.width, config.patch_size, stride=config.patch_size, dtype=dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """One token a patch."""
        return self.proj(pixels)


class SelfAttention(nnx.Module):
    """Multi-head self-attention over (B, T, D)."""

    def __init__(self, config: BlipVisionConfig, *, dtype: Any) -> None:
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, dtype=dtype)
        self.proj = Linear(config.width, config.width, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep the shape."""
        q, k, v = (y.reshape(*x.shape[:2], self.heads, -1) for y in jnp.split(self.qkv(x), 3, axis=-1))
        return self.proj(attention(q, k, v).reshape(x.shape))


class Mlp(nnx.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, config: BlipVisionConfig, *, dtype: Any) -> None:
        self.fc1 = Linear(config.width, config.inner, dtype=dtype)
        self.fc2 = Linear(config.inner, config.width, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep the shape (B, T, D)."""
        return self.fc2(activation("gelu")(self.fc1(x)))


class Block(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: BlipVisionConfig, *, dtype: Any) -> None:
        self.norm1 = LayerNorm(config.width, eps=EPS, dtype=dtype)
        self.attn = SelfAttention(config, dtype=dtype)
        self.norm2 = LayerNorm(config.width, eps=EPS, dtype=dtype)
        self.mlp = Mlp(config, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep the shape (B, T, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionEncoder(nnx.Module):
    """Normalised images (B, S, S, 3) to tokens (B, T, D), the class token first."""

    def __init__(self, config: BlipVisionConfig, *, dtype: Any) -> None:
        self.pixels = (config.image_size, config.image_size, CHANNELS)
        self.dtype = dtype
        self.patch_embed = PatchEmbed(config, dtype=dtype)
        self.cls_token = parameter((1, 1, config.width), dtype)
        self.pos_embed = parameter((1, config.positions, config.width), dtype)
        self.blocks = nnx.List([Block(config, dtype=dtype) for _ in range(config.layers)])
        self.norm = LayerNorm(config.width, eps=EPS, dtype=dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encode images; ValueError where they are not of the size that there are positions for."""
        if pixels.shape[1:] != self.pixels:
            raise ValueError(f"images of shape {pixels.shape[1:]}, but the vision encoder reads {self.pixels}")
        patches = self.patch_embed(pixels.astype(self.dtype))
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(self.cls_token[...], (patches.shape[0], 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], axis=1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
