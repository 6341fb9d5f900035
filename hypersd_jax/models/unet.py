"""The denoising UNet of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from hypersd_jax.models.execution import Execution
from hypersd_jax.models.functional import Network, build
from hypersd_jax.models.layers import GroupNorm, Linear, activation, timestep_embedding
from hypersd_jax.models.unet_blocks import DownBlock, MidBlock, UpBlock
from hypersd_jax.models.unet_config import UNetConfig


class TimeEmbedding(nnx.Module):
    """Two linear layers over sinusoids (or any vector), with an optional condition added before; always float32."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        act_fn: str = "silu",
        post_act: str | None = None,
        condition_dim: int = 0,
        how: Execution,
    ) -> None:
        self.act_fn = act_fn
        self.post_act = post_act
        self.linear_1 = Linear(in_dim, out_dim, dtype=how.dtype)
        self.cond_proj = Linear(condition_dim, in_dim, bias=False, dtype=how.dtype) if condition_dim else None
        self.linear_2 = Linear(out_dim, out_dim, dtype=how.dtype)

    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """Map (B, in_dim), and a condition (B, condition_dim), to (B, out_dim) float32."""
        x = x.astype(jnp.float32)
        if condition is not None:
            if self.cond_proj is None:
                raise ValueError("timestep_cond given, but the UNet has no time_cond_proj_dim")
            x = x + self.cond_proj(condition.astype(jnp.float32))
        x = self.linear_2(activation(self.act_fn)(self.linear_1(x)))
        return activation(self.post_act)(x) if self.post_act else x


class UNet(nnx.Module):
    """Predict noise, velocity or image (as the scheduler says) from noisy latents, time and text."""

    def __init__(self, config: UNetConfig, *, how: Execution) -> None:
        self.config = config
        self.how = how
        first, levels = config.channels[0], len(config.channels)
        self.conv_in = how.conv(
            config.in_channels, first, config.conv_in_kernel, padding=(config.conv_in_kernel - 1) // 2
        )
        self.time_embedding = TimeEmbedding(
            first,
            config.time_embedding_dim,
            act_fn=config.act_fn,
            post_act=config.timestep_post_act,
            condition_dim=config.time_cond_proj_dim,
            how=how,
        )
        self.add_embedding = (
            TimeEmbedding(config.added_dim, config.time_embedding_dim, how=how) if config.text_time else None
        )
        self.down_blocks = nnx.List([DownBlock(config, i, how=how) for i in range(levels)])
        self.mid_block = MidBlock(config, how=how) if config.mid_block_type else None
        self.up_blocks = nnx.List([UpBlock(config, i, how=how) for i in range(levels)])
        self.conv_norm_out = GroupNorm(config.groups, first, eps=config.norm_eps, dtype=how.dtype)
        self.conv_out = how.conv(
            first, config.out_channels, config.conv_out_kernel, padding=(config.conv_out_kernel - 1) // 2
        )

    def embed(
        self,
        timesteps: jax.Array,
        pooled: jax.Array | None = None,
        time_ids: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
    ) -> jax.Array:
        """Embed times (B,), and SDXL's pooled text (B, P) and time ids (B, 6), as (B, time_embedding_dim) float32."""
        config = self.config
        settings: dict[str, Any] = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        temb = self.time_embedding(timestep_embedding(timesteps, config.channels[0], **settings), timestep_cond)
        if self.add_embedding is not None:
            if pooled is None or time_ids is None:
                raise ValueError("this UNet (addition_embed_type text_time) needs pooled and time_ids")
            ids = timestep_embedding(time_ids.reshape(-1), config.addition_time_embed_dim, **settings)
            ids = ids.reshape(time_ids.shape[0], -1)
            temb = temb + self.add_embedding(jnp.concatenate([pooled.astype(jnp.float32), ids], axis=-1))
        return activation(config.time_embedding_act_fn)(temb) if config.time_embedding_act_fn else temb

    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        context: jax.Array,
        *,
        pooled: jax.Array | None = None,
        time_ids: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
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
            taps: blocks whose outputs to return too: "down_blocks.i", "mid_block", "up_blocks.i".

        Returns:
            (B, h, w, out_channels) in the network's dtype; with taps, that and a dictionary of features (B, h', w', C).

        Raises:
            ValueError: an input is missing, or a tap does not exist.
        """
        dtype, constrain = self.how.dtype, self.how.constrain_batch
        temb = constrain(self.embed(timesteps, pooled, time_ids, timestep_cond).astype(dtype))
        context = constrain(context.astype(dtype))
        x = sample.astype(dtype)
        if self.config.center_input_sample:
            x = 2 * x - 1
        x = constrain(self.conv_in(x))
        features: dict[str, jax.Array] = {}
        skips = [x]
        for i, down in enumerate(self.down_blocks):
            x, new = down(x, temb, context)
            skips += new
            features[f"down_blocks.{i}"] = x
        if self.mid_block is not None:
            x = self.mid_block(x, temb, context)
            features["mid_block"] = x
        for i, up in enumerate(self.up_blocks):
            x = up(x, skips, temb, context)
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
    return build(lambda: UNet(config, how=how))
