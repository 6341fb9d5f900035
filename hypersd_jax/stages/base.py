"""The protocol of a base model, which is all that a stage sees of it, and Stable Diffusion's implementation.

Weights are arguments of the compiled step, so `Base.predict` takes them; what a `Base` holds itself is static.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax import adapters
from hypersd_jax.adapters import Adapter
from hypersd_jax.compilation import compiler_options
from hypersd_jax.conditioning import Conditioning, PromptEncoder
from hypersd_jax.diffusion import Schedule
from hypersd_jax.errors import UserError
from hypersd_jax.models.functional import Network
from hypersd_jax.models.heads import all_taps, encoder_taps, patch_heads, pooled_heads, tap_channels
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.training import batch_sharding
from hypersd_jax.weights.components import Components

Features = dict[str, jax.Array]
MIDDLE = "mid_block"
# Features are halved until their side is this, as DMD2's heads do before their last convolution.
POOLED_SIDE = 4


class Base(Protocol):
    """A family of base models, such as Stable Diffusion."""

    @property
    def schedule(self) -> Schedule:
        """Noise schedule of the model."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape (h, w, C) of a run's latents."""

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Scheduler configuration that the schedule was made from, for the solvers."""

    @property
    def compiler_options(self) -> Mapping[str, Any]:
        """What the backend compiles its training step with, beyond the defaults."""

    @property
    def weights(self) -> Any:
        """Weights that `predict` reads."""

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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusion:
    """SD 1.x, 2.x and SDXL: a UNet under text conditioning."""

    components: Components
    resolution: int | None  # of the run's images, None for the model's own
    dtype: Any
    mesh: Mesh
    remat: bool = False

    @functools.cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Latent shape (h, w, C) at the run's resolution; UserError if it does not suit the autoencoder."""
        factor, size = self.components.vae_config.downscale, self.resolution or self.pipe.native_size[0]
        if size % factor:
            raise UserError(f"data.resolution={size} must be a multiple of the autoencoder's {factor}")
        return size // factor, size // factor, self.components.unet_config.in_channels

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Noise schedule of the model."""
        return Schedule.from_config(dict(self.scheduler_config))

    @functools.cached_property
    def pipe(self) -> Pipeline:
        """Sampling pipeline of the model."""
        return Pipeline(self.components, dtype=self.dtype, mesh=self.mesh)

    @property
    def prompts(self) -> PromptEncoder:
        """Prompt encoder of the model."""
        return self.pipe.prompts

    def around(self, components: Components) -> StableDiffusion:
        """Return a copy around other components of the same structure."""
        return dataclasses.replace(self, components=components)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Scheduler configuration of the model."""
        return self.components.scheduler_config

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Those of sampling; a bfloat16 UNet trains up to 1.6 times as fast with them on a CPU."""
        return compiler_options(self.dtype, str(self.mesh.devices.flat[0].platform))

    @property
    def weights(self) -> dict[str, jax.Array]:
        """Parameters of the UNet."""
        return dict(self.components.params["unet"])

    def predict(
        self,
        weights: Mapping[str, Any],
        x: jax.Array,
        t: jax.Array,
        cond: Conditioning,
        *,
        adapter: Any = None,
        taps: Sequence[str] = (),
    ) -> tuple[jax.Array, Features]:
        """Predict under an adapter, as `Base.predict`."""
        names = tuple(taps)
        extra = cond.unet_kwargs()
        found = self.components.unet(weights, x, t, cond.context, adapter=adapter, taps=names, **extra)
        return found if names else (found, {})

    def unconditional(self, row: Conditioning, cond: Conditioning) -> Conditioning:
        """Repeat the row's text for every sample, with the sample's own time ids (only text is zeroed or empty)."""

        def repeat(one: jax.Array, like: jax.Array) -> jax.Array:
            return jnp.broadcast_to(one, like.shape)

        pooled = None if row.pooled is None or cond.pooled is None else repeat(row.pooled, cond.pooled)
        return Conditioning(repeat(row.context, cond.context), pooled, cond.time_ids)

    def fresh_adapter(self, key: jax.Array, *, rank: int, alpha: float | None) -> Adapter:
        """Make a LoRA on the 14-module list."""
        return adapters.init(key, self.components.unet.shapes, rank=rank, alpha=alpha)

    def masters(self, adapter: Adapter) -> dict[str, jax.Array]:
        """Return the UNet's parameters in float32 with a LoRA merged into them."""
        own = {path: leaf.astype(jnp.float32) for path, leaf in self.components.params["unet"].items()}
        return adapters.merge(own, adapter)

    def discriminator(self, features: str) -> tuple[tuple[str, ...], Network]:
        """Make heads on blocks of the UNet: ``encoder``, ``all``, ``mid``, or ``pair`` (two middle blocks joined).

        Raises:
            UserError: the UNet has no middle block, and the features are of it.
        """
        config = self.components.unet_config
        how: dict[str, Any] = {
            "dtype": self.dtype,
            "remat": self.remat,
            "batch_sharding": batch_sharding(self.mesh),
        }
        if features in ("encoder", "all"):
            taps = encoder_taps(config) if features == "encoder" else all_taps(config)
            return taps, patch_heads(tap_channels(config, taps), size=1 if features == "encoder" else 3, **how)
        if not config.mid_block_type:
            raise UserError(f"adversarial.features={features}: this model's UNet has no middle block")
        width = tap_channels(config, [MIDDLE])[MIDDLE] * (2 if features == "pair" else 1)
        side = min(self.latent_shape[:2]) >> (len(config.channels) - 1)
        halvings = max(0, (side // POOLED_SIDE).bit_length() - 1)
        return (MIDDLE,), pooled_heads({MIDDLE: width}, downsamples=halvings, **how)

    def is_partial(self, taps: Sequence[str]) -> bool:
        """Tell whether no tap lies beyond the middle block, so that a call may stop there."""
        return not any(tap.startswith("up_blocks") for tap in taps)


def with_dropped(cond: Any, uncond: Any, dropped: jax.Array) -> Any:
    """Replace ``cond`` by the unconditional in the samples that ``dropped`` (B,) marks."""

    def choose(empty: jax.Array, given: jax.Array) -> jax.Array:
        return jnp.where(dropped.reshape(-1, *[1] * (given.ndim - 1)), empty, given)

    return jax.tree.map(choose, uncond, cond)
