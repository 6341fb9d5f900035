"""The denoising UNet of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from hypersd_jax.models.attention_guidance import AttentionGuidance, Text
from hypersd_jax.models.execution import Execution
from hypersd_jax.models.functional import Network, describe
from hypersd_jax.models.layers import GroupNorm, activation
from hypersd_jax.models.unet_blocks import UpBlock
from hypersd_jax.models.unet_config import UNetConfig
from hypersd_jax.models.unet_encoder import UNetEncoder


class UNet(UNetEncoder):
    """Predict noise, velocity or image (as the scheduler configuration has it) from noisy latents, time and text."""

    def __init__(self, config: UNetConfig, *, how: Execution) -> None:
        super().__init__(config, how=how)
        first, levels = config.channels[0], len(config.channels)
        self.up_blocks = nnx.List([UpBlock(config, i, how=how) for i in range(levels)])
        self.conv_norm_out = GroupNorm(config.groups, first, eps=config.norm_eps, dtype=how.dtype)
        self.conv_out = how.conv(
            first, config.out_channels, config.conv_out_kernel, padding=(config.conv_out_kernel - 1) // 2
        )

    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        context: jax.Array,
        *,
        pooled: jax.Array | None = None,
        time_ids: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
        down_residuals: Sequence[jax.Array] = (),
        mid_residual: jax.Array | None = None,
        nag: AttentionGuidance | None = None,
        taps: Sequence[str] = (),
    ) -> Any:
        """Run the network.

        Args:
            sample: noisy latents (B, h, w, in_channels); any size, odd ones too.
            timesteps: (B,), integer or real.
            context: text (B, S, cross_attention_dim).
            pooled: SDXL's pooled text (B, P).
            time_ids: SDXL's original size, crop and target size (B, 6).
            timestep_cond: an embedding (B, time_cond_proj_dim), such as LCM's of the guidance scale.
            down_residuals: what a ControlNet adds to the skips, the finest first, each (B, h', w', C) or (B, 1, 1, C).
            mid_residual: what it adds after the middle block.
            nag: negative text, away from which every attention to `context` is steered.
            taps: blocks whose outputs to return too: "down_blocks.i", "mid_block", "up_blocks.i".

        Returns:
            (B, h, w, out_channels) in the network's dtype; with taps, that and a dictionary of features (B, h', w', C).

        Raises:
            ValueError: an input is missing, residuals are not one for each skip, or a tap does not exist.
        """
        dtype, constrain = self.how.dtype, self.how.constrain_batch
        temb = constrain(self.embed(timesteps, pooled, time_ids, timestep_cond).astype(dtype))
        text = Text(constrain(context.astype(dtype)), None if nag is None else nag.cast(dtype))
        x = sample.astype(dtype)
        if self.config.center_input_sample:
            x = 2 * x - 1
        x = constrain(self.conv_in(x))
        x, skips, features = self.encode(x, temb, text)
        if down_residuals:
            if len(down_residuals) != len(skips):
                raise ValueError(f"{len(down_residuals)} down_residuals for {len(skips)} skips")
            skips = [skip + residual.astype(dtype) for skip, residual in zip(skips, down_residuals, strict=True)]
        if mid_residual is not None:
            x = x + mid_residual.astype(dtype)
        for i, up in enumerate(self.up_blocks):
            x = up(x, skips, temb, text)
            features[f"up_blocks.{i}"] = x
        x = self.conv_out(activation(self.config.act_fn)(self.conv_norm_out(x)))
        if not taps:
            return x
        for name in taps:
            if name not in features:
                raise ValueError(f"no tap {name!r}, only {', '.join(features)}")
        return x, {name: features[name] for name in taps}


def unet(
    config: UNetConfig,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
    batch_sharding: NamedSharding | None = None,
) -> Network:
    """Describe the UNet as a function of its parameters; see `UNet.__call__` and `Execution`."""
    how = Execution(dtype=jnp.dtype(dtype), remat=remat, batch_sharding=batch_sharding)
    return describe(UNet, config, how=how)
