"""Stable Diffusion as a training step sees it: the UNet, the schedule, adapters, and a discriminator's features."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax import adapters
from hypersd_jax.adapters import Adapter
from hypersd_jax.bases.base import Features
from hypersd_jax.bases.text_to_image import ControlInputs
from hypersd_jax.compilation import compiler_options
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.diffusion import Schedule
from hypersd_jax.errors import UserError
from hypersd_jax.models.attention_guidance import AttentionGuidance
from hypersd_jax.models.controlnet import control_residuals
from hypersd_jax.models.functional import Network
from hypersd_jax.models.heads import all_taps, encoder_taps, patch_heads, pooled_heads, tap_channels
from hypersd_jax.models.layers import timestep_embedding
from hypersd_jax.weights.components import Components
from hypersd_jax.weights.placement import batch_sharding

MIDDLE = "mid_block"
# Features are halved until their side is this, as DMD2's heads do before their last convolution.
POOLED_SIDE = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusionUNet:
    """A model of the family, with its parameters: what `Base` asks for.

    Attributes:
        components: networks, configurations and parameters.
        dtype: of the computation.
        mesh: devices that parameters and batches are split over; None is one device.
        resolution: side of a training run's images in pixels; None is the model's own.
        remat: recompute activations in the backward pass.
    """

    components: Components
    dtype: Any
    mesh: Mesh | None = None
    resolution: int | None = None
    remat: bool = False

    denoiser = "unet"

    def __post_init__(self) -> None:
        _ = self.schedule  # one that is not known is refused before anything is done with the model

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Noise schedule of the model."""
        return Schedule.from_config(dict(self.scheduler_config))

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Scheduler configuration of the model."""
        return self.components.scheduler_config

    @property
    def downscale(self) -> int:
        """Pixels a side of one latent."""
        return self.components.vae_config.downscale

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.components.vae_config.latent_channels

    @property
    def native_size(self) -> int | tuple[int, int]:
        """Side, or height and width, of the latents that the UNet's configuration states."""
        return self.components.unet_config.sample_size

    @functools.cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Latent shape (h, w, C) at the run's resolution; UserError if it does not suit the autoencoder."""
        native = self.native_size[0] if isinstance(self.native_size, tuple) else self.native_size
        if not (native or self.resolution):
            raise UserError("data.resolution must be given: the model's unet/config.json has no sample_size")
        pixels = self.resolution or native * self.downscale
        if pixels % self.downscale:
            raise UserError(f"data.resolution={pixels} must be a multiple of the autoencoder's {self.downscale}")
        return pixels // self.downscale, pixels // self.downscale, self.latent_channels

    @property
    def latent_side(self) -> int:
        """Side of the latents at the run's resolution, or the model's own; 0 where neither is stated."""
        native = min(self.native_size) if isinstance(self.native_size, tuple) else self.native_size or 0
        return self.resolution // self.downscale if self.resolution else native

    @property
    def image_side(self) -> int:
        """Side in pixels of the run's images."""
        return self.latent_shape[0] * self.downscale

    @property
    def weights(self) -> dict[str, jax.Array]:
        """Parameters of the UNet."""
        return dict(self.components.params[self.denoiser])

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Options of the backend; a bfloat16 UNet trains up to 1.6 times as fast with them on a CPU."""
        return compiler_options(self.dtype, None if self.mesh is None else str(self.mesh.devices.flat[0].platform))

    def predict(
        self,
        weights: Mapping[str, Any],
        x: jax.Array,
        t: jax.Array,
        cond: Conditioning,
        *,
        adapter: Any = None,
        taps: Sequence[str] = (),
        guidance: jax.Array | None = None,
        controls: ControlInputs | None = None,
        inpaint_inputs: jax.Array | None = None,
        nag: AttentionGuidance | None = None,
    ) -> tuple[jax.Array, Features]:
        """Predict under an adapter, as `TextToImage.predict`."""
        names, inputs = tuple(taps), cond.unet_kwargs()
        extra: dict[str, Any] = {"nag": nag}
        if controls is not None:
            nets = controls.networks, controls.params, controls.images, controls.scales
            skip = controls.prompted_only
            down, mid = control_residuals(*nets, x, t, cond.context, prompted_only=skip, **inputs)
            extra |= {"down_residuals": down, "mid_residual": mid}
        if guidance is not None and (dim := self.components.unet_config.time_cond_proj_dim):
            w = jnp.full((x.shape[0],), 1000 * (guidance - 1))  # LCM's guidance embedding, arXiv 2310.04378
            extra["timestep_cond"] = timestep_embedding(w, dim, flip_sin_to_cos=False, freq_shift=1.0)
        if inpaint_inputs is not None:
            x = jnp.concatenate([x, inpaint_inputs], axis=-1)
        found = self.components.unet(weights, x, t, cond.context, adapter=adapter, taps=names, **inputs, **extra)
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
        own = {path: leaf.astype(jnp.float32) for path, leaf in self.components.params[self.denoiser].items()}
        return adapters.merge(own, adapter)

    def discriminator(self, features: str) -> tuple[tuple[str, ...], Network]:
        """Make heads on blocks of the UNet: ``encoder``, ``all``, ``mid``, or ``pair`` (two middle blocks joined).

        Raises:
            UserError: the UNet has no middle block, and the features are of it.
        """
        config = self.components.unet_config
        sharding = None if self.mesh is None else batch_sharding(self.mesh)
        how: dict[str, Any] = {"dtype": self.dtype, "remat": self.remat, "batch_sharding": sharding}
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
