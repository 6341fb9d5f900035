"""The one frozen UNet under any adapter, inside a trace: teacher, student, target, fake-score model, discriminator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.adapters import Adapter
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.diffusion import guided
from hypersd_jax.weights.components import Components

Predict = Callable[[jax.Array, jax.Array, Conditioning], jax.Array]
Features = dict[str, jax.Array]
# What a call that stops at the middle block counts: nearly half the work of a whole one.
HALF = 0.5


@dataclasses.dataclass(kw_only=True)
class Networks:
    """``base`` is the frozen UNet's parameters. The calls that a trace makes are counted, a sample: a forward pass is
    one, whatever else is read of it, and one that stops at the middle block a half. ``kept`` are the features
    of the last guided call's conditional half, where they were asked for."""

    components: Components
    base: Mapping[str, Any]
    calls: float = 0.0
    kept: Features = dataclasses.field(default_factory=dict)

    def predictor(
        self, adapter: Adapter | None = None, *, params: Mapping[str, Any] | None = None, counted: bool = True
    ) -> Predict:
        """(x (B, h, w, C), t (B,), cond) -> raw prediction, of the base or of other whole weights.

        ``counted`` False: the caller knows better how often it is called than the trace does.
        """

        def predict(x: jax.Array, t: jax.Array, cond: Conditioning) -> jax.Array:
            self.calls += counted
            output: jax.Array = self._run(x, t, cond, adapter, params)[0]
            return output

        return predict

    def guided(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: Conditioning,
        uncond: Conditioning,
        guidance: jax.Array,
        *,
        taps: Sequence[str] = (),
    ) -> jax.Array:
        """The base with classifier-free guidance (B,): both halves in one call on a doubled batch."""
        self.calls += 2
        both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)
        output, found = self._run(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both, taps=tuple(taps))
        self.kept = {tap: jnp.split(value, 2)[1] for tap, value in found.items()}
        unguided, prompted = jnp.split(output.astype(jnp.float32), 2)
        return guided(unguided, prompted, guidance.reshape(-1, 1, 1, 1))

    def tapped(
        self, x: jax.Array, t: jax.Array, cond: Conditioning, taps: Sequence[str], adapter: Adapter | None = None
    ) -> tuple[jax.Array, Features]:
        """A prediction and the features of these blocks."""
        self.calls += 1
        return self._run(x, t, cond, adapter, taps=tuple(taps))

    def features(
        self, x: jax.Array, t: jax.Array, cond: Conditioning, taps: Sequence[str], adapter: Adapter | None = None
    ) -> Features:
        """The features of these blocks alone; what lies behind the last of them is not computed."""
        whole = any(tap.startswith("up_blocks") for tap in taps)
        self.calls += 1.0 if whole else HALF
        return self._run(x, t, cond, adapter, taps=tuple(taps))[1]

    def _run(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: Conditioning,
        adapter: Adapter | None = None,
        params: Mapping[str, Any] | None = None,
        taps: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Features]:
        weights = self.base if params is None else params
        found = self.components.unet(weights, x, t, cond.context, adapter=adapter, taps=taps, **cond.unet_kwargs())
        return found if taps else (found, {})


def broadcast(row: Conditioning, cond: Conditioning) -> Conditioning:
    """The unconditional row for a whole batch, with the batch's own time ids (recipes: only text is zeroed)."""

    def repeat(one: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.broadcast_to(one, like.shape)

    pooled = None if row.pooled is None or cond.pooled is None else repeat(row.pooled, cond.pooled)
    return Conditioning(repeat(row.context, cond.context), pooled, cond.time_ids)


def with_dropped(cond: Conditioning, uncond: Conditioning, dropped: jax.Array) -> Conditioning:
    """``cond`` with the unconditional in the rows that ``dropped`` (B,) names."""

    def choose(empty: jax.Array | None, given: jax.Array | None) -> jax.Array | None:
        if empty is None or given is None:
            return None
        return jnp.where(dropped.reshape(-1, *[1] * (given.ndim - 1)), empty, given)

    context = choose(uncond.context, cond.context)
    assert context is not None
    return Conditioning(context, choose(uncond.pooled, cond.pooled), cond.time_ids)
