"""ControlNet: a copy of the UNet's encoder that reads an image and steers the UNet (Zhang et al. 2023)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from hypersd_jax.models.attention_guidance import Text
from hypersd_jax.models.controlnet_config import ControlNetConfig
from hypersd_jax.models.execution import Execution
from hypersd_jax.models.functional import Network, describe
from hypersd_jax.models.unet_encoder import UNetEncoder

Residuals = tuple[tuple[jax.Array, ...], jax.Array]
"""What is added to the UNet's skips, the finest first, and after its middle block."""


class ConditioningEmbedding(nnx.Module):
    """Bring the image down to the size of the latents and the width of their first features."""

    def __init__(self, config: ControlNetConfig, *, how: Execution) -> None:
        widths = config.embedding_channels
        self.conv_in = how.conv(config.conditioning_channels, widths[0], 3, padding=1)
        blocks = []
        for width, wider in itertools.pairwise(widths):
            blocks += [how.conv(width, width, 3, padding=1), how.conv(width, wider, 3, padding=1, stride=2)]
        self.blocks = nnx.List(blocks)
        self.conv_out = how.conv(widths[-1], config.encoder.channels[0], 3, padding=1)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Map (B, H, W, conditioning_channels) to (B, H / downscale, W / downscale, C)."""
        x = jax.nn.silu(self.conv_in(image))
        for block in self.blocks:
            x = jax.nn.silu(block(x))
        return self.conv_out(x)


class ControlNet(UNetEncoder):
    """Residuals for the UNet's skips and middle, from noisy latents, time, text and an image."""

    def __init__(self, config: ControlNetConfig, *, how: Execution) -> None:
        super().__init__(config.encoder, how=how)
        self.control = config
        widths = config.skip_channels
        self.controlnet_cond_embedding = ConditioningEmbedding(config, how=how)
        self.controlnet_down_blocks = nnx.List([how.conv(width, width, 1) for width in widths])
        self.controlnet_mid_block = how.conv(widths[-1], widths[-1], 1)

    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        context: jax.Array,
        image: jax.Array,
        scales: jax.Array,
        *,
        pooled: jax.Array | None = None,
        time_ids: jax.Array | None = None,
    ) -> Residuals:
        """Run the network.

        Args:
            sample: noisy latents (B, h, w, in_channels), scaled as for the UNet.
            timesteps: (B,).
            context: text (B, S, cross_attention_dim).
            image: (B, h downscale, w downscale, conditioning_channels) in 0..1.
            scales: float32, one for each skip and one for the middle, see `residual_scales`.
            pooled: SDXL's pooled text (B, P).
            time_ids: SDXL's sizes (B, 6).

        Returns:
            One array (B, h', w', C) for each skip, or (B, 1, 1, C) with `global_pool`, and one for the middle.

        Raises:
            ValueError: an input is missing, or the image's size does not go with the latents'.
        """
        dtype, constrain = self.how.dtype, self.how.constrain_batch
        height, width = (side * self.control.downscale for side in sample.shape[1:3])
        if image.shape[1:3] != (height, width):
            raise ValueError(f"the image is {image.shape[1:3]}, but these latents need {(height, width)}")
        temb = constrain(self.embed(timesteps, pooled, time_ids).astype(dtype))
        image = image[..., ::-1] if self.control.bgr else image
        x = self.conv_in(sample.astype(dtype)) + self.controlnet_cond_embedding(constrain(image.astype(dtype)))
        x, skips, _ = self.encode(constrain(x), temb, Text(constrain(context.astype(dtype))))
        residuals = [block(skip) for block, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        residuals.append(self.controlnet_mid_block(x))
        residuals = [residual * scales[i].astype(dtype) for i, residual in enumerate(residuals)]
        if self.control.global_pool:
            residuals = [jnp.mean(residual, axis=(1, 2), keepdims=True) for residual in residuals]
        return tuple(residuals[:-1]), residuals[-1]


def residual_scales(config: ControlNetConfig, scale: float, *, guess: bool = False) -> np.ndarray:
    """Compute the scale of each residual, float32: `scale` for all, or rising from a tenth of it in guess mode.

    Guess mode lets the image speak without a prompt: the finest residual gets 0.1, the middle one 1, geometrically
    between. With `global_pool` it changes nothing here.
    """
    count = len(config.skip_channels) + 1
    rising = guess and not config.global_pool
    return (scale * (np.logspace(-1, 0, count) if rising else np.ones(count))).astype(np.float32)


def sum_residuals(residuals: Sequence[Residuals]) -> Residuals:
    """Add up the residuals of several ControlNets."""
    downs, mids = zip(*residuals, strict=True)
    return tuple(sum(level[1:], level[0]) for level in zip(*downs, strict=True)), sum(mids[1:], mids[0])


def control_residuals(
    networks: Sequence[Network],
    params: Sequence[Mapping[str, Any]],
    images: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    sample: jax.Array,
    timesteps: jax.Array,
    context: jax.Array,
    *,
    prompted_only: bool = False,
    **inputs: Any,
) -> Residuals:
    """Compute what several ControlNets add to one call of the UNet, by its own arguments.

    Args:
        networks: one description for each.
        params: parameters of each.
        images: the image of each, (B, H, W, C) where the UNet's batch is B, or 2B under classifier-free guidance.
        scales: see `residual_scales`, for each.
        sample, timesteps, context: the UNet's, the unconditional half of the batch first under guidance.
        prompted_only: leave the unconditional half alone, as diffusers does in guess mode and with `global_pool`.
        **inputs: `pooled` and `time_ids` for SDXL.
    """
    batch = sample.shape[0]
    skipped = batch - images[0].shape[0] if prompted_only else 0
    seen = [value[skipped:] for value in (sample, timesteps, context)]
    inputs = {name: value[skipped:] for name, value in inputs.items()}

    def one(network: Network, own: Mapping[str, Any], image: jax.Array, scale: jax.Array) -> Residuals:
        image = image if skipped or image.shape[0] == batch else jnp.concatenate([image, image])
        residuals: Residuals = network(own, *seen, image, scale, **inputs)
        return residuals

    total = sum_residuals([one(*each) for each in zip(networks, params, images, scales, strict=True)])
    if not skipped:
        return total
    return jax.tree.map(lambda rest: jnp.pad(rest, ((skipped, 0), (0, 0), (0, 0), (0, 0))), total)


def controlnet(
    config: ControlNetConfig, *, dtype: Any = jnp.float32, batch_sharding: NamedSharding | None = None
) -> Network:
    """Describe the ControlNet as a function of its parameters; see `ControlNet.__call__`."""
    how = Execution(dtype=jnp.dtype(dtype), batch_sharding=batch_sharding)
    return describe(ControlNet, config, how=how)
