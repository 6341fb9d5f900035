"""Normalised attention guidance: negative prompts without classifier-free guidance (NAG, arXiv 2505.21179)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class AttentionGuidance(NamedTuple):
    """What every attention to the text is steered away from, and how far.

    Attributes:
        negative: negative text (B, S', D) of the last B samples of a batch; those before them stay as they are.
        scale: how far beyond the positive prompt's features to go, float32 scalar; 1 stays there.
        tau: how many times the positive features' L1 norm those beyond may have, float32 scalar.
        alpha: share of the features beyond in the result, 0 to 1, float32 scalar; the rest are the positive ones.
    """

    negative: jax.Array
    scale: Any
    tau: Any
    alpha: Any

    def cast(self, dtype: Any) -> AttentionGuidance:
        """Return a copy with the text in a network's data type."""
        return self._replace(negative=self.negative.astype(dtype))

    def steer(self, positive: jax.Array, negative: jax.Array) -> jax.Array:
        """Steer features away from the negative prompt's, in float32 over all heads.

            z~ = scale z+ - (scale - 1) z-
            z^ = z~ min(1, tau |z+|_1 / |z~|_1)
            z  = alpha z^ + (1 - alpha) z+

        Args:
            positive: attention to the prompts (n, L, C), before the output projection; n is B or more.
            negative: the last B samples' attention to the negative prompts (B, L, C).

        Returns:
            (n, L, C) in the dtype of `positive`; the first n - B samples are returned as they are.
        """
        count = len(negative)
        z, away = positive[-count:].astype(jnp.float32), negative.astype(jnp.float32)
        beyond = self.scale * z - (self.scale - 1) * away
        bound, length = self.tau * _l1(z), _l1(beyond)
        # One where the bound holds, also where both are zero.
        shrink = jnp.where(length > bound, bound / jnp.where(length > bound, length, 1), 1)
        steered = (self.alpha * shrink * beyond + (1 - self.alpha) * z).astype(positive.dtype)
        return steered if count == len(positive) else jnp.concatenate([positive[:-count], steered])


class Text(NamedTuple):
    """Text that a network attends to: ``tokens`` (B, S, D), and what to steer away from."""

    tokens: jax.Array
    guidance: AttentionGuidance | None = None


def _l1(z: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(z), axis=-1, keepdims=True)
