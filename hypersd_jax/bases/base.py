"""The protocol of a base model, which is all that a training step sees of it.

Weights are arguments of the compiled step, so `Base.predict` takes them; what a `Base` holds itself is static.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from hypersd_jax.adapters import Adapter
from hypersd_jax.diffusion import Schedule
from hypersd_jax.models.functional import Network

Features = dict[str, jax.Array]
"""Activations (B, h, w, C) by the name of the block that gives them."""


class Base(Protocol):
    """A family of base models, such as Stable Diffusion, as a training step sees it."""

    @property
    def schedule(self) -> Schedule:
        """Noise schedule of the model."""

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Scheduler configuration that the schedule was made from, for the solvers."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape (h, w, C) of a run's latents."""

    @property
    def weights(self) -> Any:
        """Weights that `predict` reads."""

    @property
    def compiler_options(self) -> Mapping[str, Any]:
        """What the backend compiles its programs with, beyond the defaults."""

    def predict(
        self, weights: Any, x: jax.Array, t: jax.Array, cond: Any, *, adapter: Any = None, taps: Sequence[str] = ()
    ) -> tuple[jax.Array, Features]:
        """Predict at latents (B, h, w, C) and timesteps (B,) int32 under an adapter; also return named features."""

    def unconditional(self, row: Any, cond: Any) -> Any:
        """Repeat the unconditional, of which ``row`` holds one sample, for every sample of ``cond``."""

    def fresh_adapter(self, key: jax.Array, *, rank: int, alpha: float | None) -> Adapter:
        """Make a new adapter whose output is zero."""

    def masters(self, adapter: Adapter) -> Any:
        """Return float32 weights for full fine-tuning, with an adapter merged into them."""

    def discriminator(self, features: str) -> tuple[tuple[str, ...], Network]:
        """Return a discriminator's taps and its heads: (params, features by tap) -> logits by tap."""

    def is_partial(self, taps: Sequence[str]) -> bool:
        """Tell whether features alone cost about half a call."""
