"""Discriminator heads: small networks that map a UNet's features to logits of being real, at each position.

The discriminator of adversarial distillation is a UNet, whose blocks give the features ("taps"), and one head for each
tap. All heads of this module are called as `network(params, features)`, features (B, h, w, C) by tap, and return
logits (B, h', w', 1) by tap; their parameters are float32 whatever the data type they compute in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from hypersd_jax.models.execution import Execution
from hypersd_jax.models.functional import Network, build
from hypersd_jax.models.layers import Conv, GroupNorm
from hypersd_jax.models.unet_config import UNetConfig

MAX_GROUPS = 32
# A group of one channel is normalised to its shift alone where a map has one pixel: no feature would be left.
MIN_GROUP = 4
NORM_EPS = 1e-5
LEAK = 0.01


def _norm(channels: int) -> GroupNorm:
    """GroupNorm in 32 groups; on fewer than 128 channels in fewer, so that a group keeps at least four."""
    most = max(1, min(MAX_GROUPS, channels // MIN_GROUP))
    groups = next(count for count in range(most, 0, -1) if channels % count == 0)
    return GroupNorm(groups, channels, eps=NORM_EPS)


class PatchHead(nnx.Module):
    """Two blocks of convolution, GroupNorm and leaky ReLU, the second around a skip; then one channel."""

    def __init__(self, channels: int, size: int, *, how: Execution) -> None:
        padding = (size - 1) // 2
        self.conv1 = Conv(channels, channels, size, padding=padding, platform=how.platform)
        self.norm1 = _norm(channels)
        self.conv2 = Conv(channels, channels, size, padding=padding, platform=how.platform)
        self.norm2 = _norm(channels)
        self.conv_out = Conv(channels, 1, 1, platform=how.platform)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, h, w, C) to logits (B, h, w, 1) float32."""
        x = jax.nn.leaky_relu(self.norm1(self.conv1(x)), LEAK)
        x = x + jax.nn.leaky_relu(self.norm2(self.conv2(x)), LEAK)
        return self.conv_out(x.astype(jnp.float32))


class PooledHead(nnx.Module):
    """Blocks that halve the resolution, each a 4x4 convolution, GroupNorm and SiLU; then one channel."""

    def __init__(self, channels: int, downsamples: int, *, how: Execution) -> None:
        self.downsamples = downsamples
        self.convs = nnx.List(
            [Conv(channels, channels, 4, stride=2, padding=1, platform=how.platform) for _ in range(downsamples)]
        )
        self.norms = nnx.List([_norm(channels) for _ in range(downsamples)])
        self.conv_out = Conv(channels, 1, 1, platform=how.platform)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, h, w, C) to logits (B, h // 2^n, w // 2^n, 1) float32; ValueError if that leaves no pixel."""
        if min(x.shape[1:3]) >> self.downsamples == 0:
            raise ValueError(f"features of {x.shape[1]}x{x.shape[2]} cannot be halved {self.downsamples} times")
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
        return self.conv_out(x.astype(jnp.float32))


class Heads(nnx.Module):
    """One head for each tap; in a parameter's path the tap's dot is an underscore: `heads.down_blocks_0.conv1.kernel`.

    A head's first parameters depend on its tap, so that they do not change with the other taps.
    """

    def __init__(
        self, channels: Mapping[str, int], make: Callable[[int], PatchHead | PooledHead], *, how: Execution
    ) -> None:
        self.how = how
        self.taps = tuple(channels)
        self.heads = nnx.Dict({_attribute(tap): make(width) for tap, width in channels.items()})

    def __call__(self, features: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Map features (B, h, w, C) to logits (B, h', w', 1) float32, by tap.

        Raises:
            ValueError: the features are not those of the heads' taps.
        """
        if set(features) != set(self.taps):
            raise ValueError(f"features of {', '.join(features)} for heads on {', '.join(self.taps)}")
        return {
            tap: self.how.run(self.heads[_attribute(tap)], features[tap].astype(self.how.dtype)) for tap in self.taps
        }


def _attribute(tap: str) -> str:
    return tap.replace(".", "_")


def patch_heads(
    channels: Mapping[str, int],
    *,
    size: int = 1,
    dtype: Any = jnp.float32,
    remat: bool = False,
    batch_sharding: NamedSharding | None = None,
) -> Network:
    """Describe one `PatchHead` for each tap, as PCM's training code has them (arXiv 2405.18407).

    With `size` 1 each position has a logit of its own features, as with PCM on SDXL; its heads on SD 1.5 have `size` 3.

    Args:
        channels: of the features, by tap (`tap_channels`).
        size: an odd kernel size.
        dtype: of the computation, but for the last layer, which is float32.
        remat: see `Execution`.
        batch_sharding: see `Execution`.
    """
    how = Execution(dtype=jnp.dtype(dtype), remat=remat, batch_sharding=batch_sharding)
    return build(lambda: Heads(channels, lambda width: PatchHead(width, size, how=how), how=how))


def pooled_heads(
    channels: Mapping[str, int],
    *,
    downsamples: int,
    dtype: Any = jnp.float32,
    remat: bool = False,
    batch_sharding: NamedSharding | None = None,
) -> Network:
    """Describe one `PooledHead` for each tap, as SDXL-Lightning (arXiv 2402.13929) and DMD2 (arXiv 2405.14867) do.

    DMD2 ends in a 4x4 convolution to one pixel; here the losses average the logits, so that any size will do.

    Args:
        channels: of the features, by tap; of two features joined on channels, their sum.
        downsamples: how often the resolution is halved.
        dtype: of the computation, but for the last layer, which is float32.
        remat: see `Execution`.
        batch_sharding: see `Execution`.
    """
    how = Execution(dtype=jnp.dtype(dtype), remat=remat, batch_sharding=batch_sharding)
    return build(lambda: Heads(channels, lambda width: PooledHead(width, downsamples, how=how), how=how))


def encoder_taps(config: UNetConfig) -> tuple[str, ...]:
    """The blocks down and the middle one, which PCM taps on SDXL: the blocks up then need not run."""
    down = tuple(f"down_blocks.{i}" for i in range(len(config.channels)))
    return (*down, "mid_block") if config.mid_block_type else down


def all_taps(config: UNetConfig) -> tuple[str, ...]:
    """Every block, which PCM taps on SD 1.5: nine of them."""
    return (*encoder_taps(config), *(f"up_blocks.{i}" for i in range(len(config.channels))))


def tap_channels(config: UNetConfig, taps: Sequence[str]) -> dict[str, int]:
    """Count the channels of the outputs of these blocks, by name.

    Raises:
        ValueError: the UNet has no such block.
    """
    up = reversed(config.channels)
    middle = (config.channels[-1],) if config.mid_block_type else ()
    known = dict(zip(all_taps(config), (*config.channels, *middle, *up), strict=True))
    for tap in taps:
        if tap not in known:
            raise ValueError(f"no tap {tap!r}, only {', '.join(known)}")
    return {tap: known[tap] for tap in taps}
