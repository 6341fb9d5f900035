"""The one base under any adapter, inside a step: teacher, student, target, fake-score model, features."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.diffusion import guided
from hypersd_jax.distill import Model
from hypersd_jax.stages.base import Base, Features

# What features that stop at the middle block count: nearly half the work of a whole call.
HALF = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """A base and its weights, as the step was given them."""

    base: Base
    weights: Any

    def predictor(self, adapter: Any = None, *, weights: Any = None) -> Model:
        """(x (B, h, w, C), t (B,), cond) -> raw prediction, of the base under an adapter or of other whole weights."""
        own = self.weights if weights is None else weights
        return lambda x, t, cond: self.base.predict(own, x, t, cond, adapter=adapter)[0]

    def guided(
        self, x: jax.Array, t: jax.Array, cond: Any, uncond: Any, guidance: jax.Array, *, taps: Sequence[str] = ()
    ) -> tuple[jax.Array, Features]:
        """The base with classifier-free guidance (B,), both halves in one call on a doubled batch.

        The features are those of the prompted half.
        """
        both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)
        x, t = jnp.concatenate([x, x]), jnp.concatenate([t, t])
        output, found = self.base.predict(self.weights, x, t, both, taps=taps)
        unguided, prompted = jnp.split(output.astype(jnp.float32), 2)
        features = {tap: jnp.split(value, 2)[1] for tap, value in found.items()}
        return guided(unguided, prompted, guidance.reshape(-1, 1, 1, 1)), features

    def tapped(
        self, x: jax.Array, t: jax.Array, cond: Any, taps: Sequence[str], adapter: Any = None
    ) -> tuple[jax.Array, Features]:
        """A prediction and the features of these blocks; what lies behind the last of those read is not computed."""
        return self.base.predict(self.weights, x, t, cond, adapter=adapter, taps=taps)
