"""The half of the UNet that its ControlNets share: time and size embeddings, the blocks down and the middle one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hypersd_jax.models.attention_guidance import Text
from hypersd_jax.models.execution import Execution
from hypersd_jax.models.layers import Linear, activation, timestep_embedding
from hypersd_jax.models.unet_blocks import DownBlock, MidBlock
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


class UNetEncoder(nnx.Module):
    """Embeddings, blocks down and middle block."""

    def __init__(self, config: UNetConfig, *, how: Execution) -> None:
        self.config = config
        self.how = how
        first = config.channels[0]
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
        self.down_blocks = nnx.List([DownBlock(config, i, how=how) for i in range(len(config.channels))])
        self.mid_block = MidBlock(config, how=how) if config.mid_block_type else None

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

    def encode(
        self, x: jax.Array, temb: jax.Array, context: Text
    ) -> tuple[jax.Array, list[jax.Array], dict[str, jax.Array]]:
        """Run the blocks down and the middle one.

        Args:
            x: features after `conv_in` (B, h, w, channels[0]).
            temb: what `embed` gives, in the network's dtype.
            context: text (B, S, cross_attention_dim), likewise, with what to steer away from.

        Returns:
            The coarsest features; the skips, `x` first; and every block's output by its name.
        """
        skips, features = [x], {}
        for i, down in enumerate(self.down_blocks):
            x, new = down(x, temb, context)
            skips += new
            features[f"down_blocks.{i}"] = x
        if self.mid_block is not None:
            x = self.mid_block(x, temb, context)
            features["mid_block"] = x
        return x, skips, features
