"""Residual blocks and resampling, shared by the UNet and the autoencoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from hypersd_jax.models.execution import Execution
from hypersd_jax.models.layers import GroupNorm, Linear, Padding, activation


class ResnetBlock(nnx.Module):
    """Two normalised convolutions around a skip, shifted (or scaled and shifted) by the time embedding between them.

    `time_dim` 0 means a block without time embedding; `divisor` divides the sum of both paths.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_dim: int = 0,
        groups: int,
        eps: float,
        act_fn: str,
        scale_shift: bool = False,
        divisor: float = 1.0,
        how: Execution,
    ) -> None:
        self.act_fn = act_fn
        self.scale_shift = scale_shift
        self.divisor = divisor
        self.norm1 = GroupNorm(groups, in_channels, eps=eps, dtype=how.dtype)
        self.conv1 = how.conv(in_channels, out_channels, 3, padding=1)
        if time_dim:
            width = 2 * out_channels if scale_shift else out_channels
            self.time_emb_proj = Linear(time_dim, width, dtype=how.dtype)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps, dtype=how.dtype)
        self.conv2 = how.conv(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = how.conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        """Map (B, H, W, in) and a time embedding (B, time_dim) to (B, H, W, out)."""
        act = activation(self.act_fn)
        y = self.conv1(act(self.norm1(x)))
        if temb is None:
            y = self.norm2(y)
        else:
            time = self.time_emb_proj(act(temb))[:, None, None, :]
            if self.scale_shift:
                scale, shift = jnp.split(time, 2, axis=-1)
                y = self.norm2(y) * (1 + scale) + shift
            else:
                y = self.norm2(y + time)
        y = self.conv2(act(y))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return (x + y) / self.divisor if self.divisor != 1.0 else x + y


class Downsample(nnx.Module):
    """Halve the resolution by a strided convolution; `padding` 0 pads one row below and one column at the right."""

    def __init__(self, channels: int, padding: int, *, how: Execution) -> None:
        sides: Padding | int = padding if padding else ((0, 1), (0, 1))
        self.conv = how.conv(channels, channels, 3, stride=2, padding=sides)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, ceil(H/2), ceil(W/2), C), or floor with `padding` 0."""
        return self.conv(x)
