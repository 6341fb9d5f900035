"""BERT (Devlin et al. 2018, arXiv:1810.04805) that looks at an image: BLIP's text encoder with cross-attention.

A post-norm encoder; each layer attends to the text, then to the image's tokens. There are no token types and no pooler.
Attribute paths are those of the authors' files, which are transformers'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hypersd_jax.models.dot_product import attention
from hypersd_jax.models.layers import Embedding, LayerNorm, Linear, activation

EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of the encoder; the defaults are those of ImageReward: bert-base-uncased and two marks of BLIP's.

    Attributes:
        context_width: of the image's tokens.
    """

    vocabulary: int = 30524
    positions: int = 512
    width: int = 768
    inner: int = 3072
    layers: int = 12
    heads: int = 12
    context_width: int = 1024


class Embeddings(nnx.Module):
    """Token plus position embedding, normalised: ids (B, S) to (B, S, D)."""

    def __init__(self, config: BertConfig, *, dtype: Any) -> None:
        self.word_embeddings = Embedding(config.vocabulary, config.width, dtype=dtype)
        self.position_embeddings = Embedding(config.positions, config.width, dtype=dtype)
        self.LayerNorm = LayerNorm(config.width, eps=EPS, dtype=dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Embed ids."""
        positions = self.position_embeddings(jnp.arange(ids.shape[1]))
        return self.LayerNorm(self.word_embeddings(ids) + positions[None])


class Projections(nnx.Module):
    """Multi-head attention from (B, S, D) to a context (B, T, C), without the projection of what it gives."""

    def __init__(self, config: BertConfig, context_width: int, *, dtype: Any) -> None:
        self.heads = config.heads
        self.query = Linear(config.width, config.width, dtype=dtype)
        self.key = Linear(context_width, config.width, dtype=dtype)
        self.value = Linear(context_width, config.width, dtype=dtype)

    def __call__(self, x: jax.Array, context: jax.Array, keep: jax.Array | None) -> jax.Array:
        """Attend to the context's tokens that `keep` (B, T) holds, or to all."""
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1) for y in (self.query(x), self.key(context), self.value(context))
        )
        return attention(q, k, v, keep=keep).reshape(x.shape)


class Output(nnx.Module):
    """A projection that is added to what came before, then normalised."""

    def __init__(self, inner: int, width: int, *, dtype: Any) -> None:
        self.dense = Linear(inner, width, dtype=dtype)
        self.LayerNorm = LayerNorm(width, eps=EPS, dtype=dtype)

    def __call__(self, x: jax.Array, before: jax.Array) -> jax.Array:
        """Map (B, S, inner) and (B, S, D) to (B, S, D)."""
        return self.LayerNorm(self.dense(x) + before)


class Attention(nnx.Module):
    """Attention to a context with its output."""

    def __init__(self, config: BertConfig, context_width: int, *, dtype: Any) -> None:
        self.self = Projections(config, context_width, dtype=dtype)
        self.output = Output(config.width, config.width, dtype=dtype)

    def __call__(self, x: jax.Array, context: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Keep the shape (B, S, D)."""
        return self.output(self.self(x, context, keep), x)


class Intermediate(nnx.Module):
    """The wide layer of the feed-forward part, with the exact GELU."""

    def __init__(self, config: BertConfig, *, dtype: Any) -> None:
        self.dense = Linear(config.width, config.inner, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, S, D) to (B, S, inner)."""
        return activation("gelu")(self.dense(x))


class Layer(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each normalised behind its sum."""

    def __init__(self, config: BertConfig, *, dtype: Any) -> None:
        self.attention = Attention(config, config.width, dtype=dtype)
        self.crossattention = Attention(config, config.context_width, dtype=dtype)
        self.intermediate = Intermediate(config, dtype=dtype)
        self.output = Output(config.inner, config.width, dtype=dtype)

    def __call__(self, x: jax.Array, keep: jax.Array, context: jax.Array) -> jax.Array:
        """Keep the shape (B, S, D)."""
        x = self.attention(x, x, keep)
        x = self.crossattention(x, context)
        return self.output(self.intermediate(x), x)


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig, *, dtype: Any) -> None:
        self.layer = nnx.List([Layer(config, dtype=dtype) for _ in range(config.layers)])

    def __call__(self, x: jax.Array, keep: jax.Array, context: jax.Array) -> jax.Array:
        """Keep the shape (B, S, D)."""
        for layer in self.layer:
            x = layer(x, keep, context)
        return x


class BertEncoder(nnx.Module):
    """Ids (B, S), which of them are seen (B, S) and an image's tokens (B, T, C) to states (B, S, D)."""

    def __init__(self, config: BertConfig, *, dtype: Any) -> None:
        self.embeddings = Embeddings(config, dtype=dtype)
        self.encoder = Encoder(config, dtype=dtype)

    def __call__(self, ids: jax.Array, keep: jax.Array, context: jax.Array) -> jax.Array:
        """The last hidden states."""
        return self.encoder(self.embeddings(ids), keep, context)
