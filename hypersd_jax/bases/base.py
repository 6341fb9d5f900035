"""A base model as a training step sees it: the protocol, and its calls as teacher, student, target or fake score model.

Weights are arguments of the compiled step, so `Base.predict` takes them; what a `Base` holds itself is static.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from hypersd_jax.adapters import Adapter
from hypersd_jax.diffusion import Schedule, guided
from hypersd_jax.distill import Model
from hypersd_jax.models.functional import Network

Features = dict[str, jax.Array]
"""Activations (B, h, w, C) by the name of the block that gives them."""

# What features that stop at the middle block count: nearly half the work of a whole call.
HALF = 0.5


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
        """Compiler options of its programs, beyond the defaults."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """A base and its weights, inside a training step."""

    base: Base
    weights: Any

    def predictor(self, adapter: Any = None, *, weights: Any = None) -> Model:
        """Make (x (B, h, w, C), t (B,), cond) -> raw prediction, of the base under an adapter or of other weights."""
        own = self.weights if weights is None else weights
        return lambda x, t, cond: self.base.predict(own, x, t, cond, adapter=adapter)[0]

    def guided(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: Any,
        uncond: Any,
        guidance: jax.Array,
        *,
        taps: Sequence[str] = (),
        adapter: Any = None,
    ) -> tuple[jax.Array, Features]:
        """Predict with classifier-free guidance (B,), both halves in one call of the base on a doubled batch.

        The features are those of the prompted half.
        """

        def predict(x: jax.Array, t: jax.Array, cond: Any) -> tuple[jax.Array, Features]:
            return self.base.predict(self.weights, x, t, cond, taps=taps, adapter=adapter)

        (unguided, _), (prompted, features) = in_one_call(predict, (x, t, uncond), (x, t, cond))
        return guided(unguided, prompted, guidance.reshape(-1, 1, 1, 1)), features

    def tapped(
        self, x: jax.Array, t: jax.Array, cond: Any, taps: Sequence[str], adapter: Any = None
    ) -> tuple[jax.Array, Features]:
        """Predict and return the features of these blocks; nothing beyond the last of them is computed."""
        return self.base.predict(self.weights, x, t, cond, adapter=adapter, taps=taps)


def in_one_call(model: Callable[..., Any], *inputs: tuple[Any, ...]) -> list[Any]:
    """Call a model once on several batches of one size, and return what it gives for each.

    Every call in a step is a program of its own to compile, so fewer and larger ones compile sooner. A sample's inputs
    lie side by side in the joint batch, so that a batch split over devices stays where it is.

    Args:
        model: of arrays and trees of arrays whose first axis is the batch's, and so are those that it returns.
        inputs: the arguments of each call, of equal structure and shapes.
    """
    if len(inputs) == 1:
        return [model(*inputs[0])]

    def join(*leaves: Any) -> jax.Array:
        stacked = jnp.stack(leaves, axis=1)
        return stacked.reshape(-1, *stacked.shape[2:])

    def part(leaf: jax.Array, number: int) -> jax.Array:
        return leaf.reshape(-1, len(inputs), *leaf.shape[1:])[:, number]

    outputs = model(*jax.tree.map(join, *inputs))
    return [jax.tree.map(partial(part, number=number), outputs) for number in range(len(inputs))]


def in_one_loop(model: Callable[..., Any], *inputs: tuple[Any, ...]) -> list[Any]:
    """Call a model on several batches of one size, one after the other, and return what it gives for each.

    As `in_one_call` it is one program to compile, and for a batch size that other calls have too.

    Args:
        model: of arrays and trees of arrays.
        inputs: the arguments of each call, of equal structure and shapes.
    """
    if len(inputs) == 1:
        return [model(*inputs[0])]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    outputs = jax.lax.map(lambda each: model(*each), stacked)
    return [jax.tree.map(lambda leaf, number=number: leaf[number], outputs) for number in range(len(inputs))]


def with_dropped(cond: Any, uncond: Any, dropped: jax.Array) -> Any:
    """Replace ``cond`` by the unconditional in the samples that ``dropped`` (B,) marks."""

    def choose(empty: jax.Array, given: jax.Array) -> jax.Array:
        return jnp.where(dropped.reshape(-1, *[1] * (given.ndim - 1)), empty, given)

    return jax.tree.map(choose, uncond, cond)
