"""Transformers over the pixels of a feature map, with attention to the text context."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from hypersd_jax.models.attention_guidance import Text
from hypersd_jax.models.dot_product import attention
from hypersd_jax.models.execution import Execution
from hypersd_jax.models.layers import Conv, Empty, GroupNorm, LayerNorm, Linear, activation


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """Settings that the transformers of one UNet block share."""

    heads: int
    context_dim: int
    groups: int
    linear_projection: bool
    only_cross_attention: bool = False


class Attention(nnx.Module):
    """Multi-head attention from (B, L, C) to text (B, S, D), or to itself."""

    def __init__(self, dim: int, context_dim: int, heads: int, *, bias: bool = False, how: Execution) -> None:
        self.heads = heads
        self.how = how
        self.to_q = Linear(dim, dim, bias=bias, dtype=how.dtype)
        self.to_k = Linear(context_dim, dim, bias=bias, dtype=how.dtype)
        self.to_v = Linear(context_dim, dim, bias=bias, dtype=how.dtype)
        self.to_out = nnx.List([Linear(dim, dim, dtype=how.dtype)])

    def __call__(self, x: jax.Array, context: Text | None = None) -> jax.Array:
        """Map (B, L, C) to (B, L, C)."""
        text = Text(x) if context is None else context
        q = self.to_q(x)
        y = self._attend(q, text.tokens)
        if (guidance := text.guidance) is not None:
            steered = self.how.constrain_batch(q[-len(guidance.negative) :])
            y = guidance.steer(y, self._attend(steered, guidance.negative))
        return self.to_out[0](y)

    def _attend(self, q: jax.Array, tokens: jax.Array) -> jax.Array:
        """Attend from queries (B, L, C) to tokens (B, S, D), giving (B, L, C) before the output projection."""
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in (q, self.to_k(tokens), self.to_v(tokens)))
        y = attention(q, k, v, platform=self.how.platform, batch_sharding=self.how.batch_sharding)
        return y.reshape(*y.shape[:2], -1)


class GEGLU(nnx.Module):
    """x W1 * gelu(x W2), both halves in one projection (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, dim: int, inner: int, *, how: Execution) -> None:
        self.how = how
        self.proj = Linear(dim, 2 * inner, dtype=how.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, L, dim) to (B, L, inner)."""
        y = self.how.constrain_batch(self.proj(x))  # else the compiler splits the kernel's many columns instead
        inner = y.shape[-1] // 2
        return y[..., :inner] * activation("gelu")(y[..., inner:])


class FeedForward(nnx.Module):
    """GEGLU of four times the width, then a projection back; index 1 is the original's dropout."""

    def __init__(self, dim: int, *, how: Execution) -> None:
        self.net = nnx.List([GEGLU(dim, 4 * dim, how=how), Empty(), Linear(4 * dim, dim, dtype=how.dtype)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, L, C) to (B, L, C)."""
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each on a normalised input and added to it."""

    def __init__(self, dim: int, shape: TransformerShape, *, how: Execution) -> None:
        self.only_cross_attention = shape.only_cross_attention
        first = shape.context_dim if shape.only_cross_attention else dim
        self.norm1 = LayerNorm(dim, dtype=how.dtype)
        self.attn1 = Attention(dim, first, shape.heads, how=how)
        self.norm2 = LayerNorm(dim, dtype=how.dtype)
        self.attn2 = Attention(dim, shape.context_dim, shape.heads, how=how)
        self.norm3 = LayerNorm(dim, dtype=how.dtype)
        self.ff = FeedForward(dim, how=how)

    def __call__(self, x: jax.Array, context: Text) -> jax.Array:
        """Map (B, L, C) and text (B, S, D) to (B, L, C)."""
        x = x + self.attn1(self.norm1(x), context if self.only_cross_attention else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """Transformer blocks over the pixels of (B, H, W, C), between two projections and around a skip."""

    def __init__(self, dim: int, layers: int, shape: TransformerShape, *, how: Execution) -> None:
        self.how = how
        self.norm = GroupNorm(shape.groups, dim, eps=1e-6, dtype=how.dtype)
        self.proj_in = _projection(dim, shape, how)
        self.transformer_blocks = nnx.List([BasicTransformerBlock(dim, shape, how=how) for _ in range(layers)])
        self.proj_out = _projection(dim, shape, how)

    def __call__(self, x: jax.Array, context: Text) -> jax.Array:
        """Map (B, H, W, C) and text (B, S, D) to (B, H, W, C)."""
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        for block in self.transformer_blocks:
            y = self.how.run(block, y, context)
        return self.how.constrain_batch(x + self.proj_out(y.reshape(x.shape)))


def _projection(dim: int, shape: TransformerShape, how: Execution) -> Linear | Conv:
    """Make the projection into or out of the transformer; both kinds compute the same, the files differ."""
    if shape.linear_projection:
        return Linear(dim, dim, dtype=how.dtype)
    return how.conv(dim, dim, 1)
