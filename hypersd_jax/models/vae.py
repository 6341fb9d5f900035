"""The autoencoder between images and latents (Rombach et al. 2022, KL variant)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from hypersd_jax.models.attention import Attention
from hypersd_jax.models.attention_guidance import Text
from hypersd_jax.models.execution import Execution
from hypersd_jax.models.functional import Network, describe
from hypersd_jax.models.layers import GroupNorm
from hypersd_jax.models.resnet import Downsample, ResnetBlock
from hypersd_jax.models.upsample import Upsample
from hypersd_jax.models.vae_config import VaeConfig

EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


def _resnet(config: VaeConfig, how: Execution) -> partial[ResnetBlock]:
    return partial(ResnetBlock, groups=config.groups, eps=EPS, act_fn=config.act_fn, how=how)


class PixelAttention(Attention):
    """One head of self-attention over all pixels of (B, H, W, C), normalised before and added to its input."""

    def __init__(self, channels: int, groups: int, *, how: Execution) -> None:
        super().__init__(channels, channels, 1, bias=True, how=how)
        self.group_norm = GroupNorm(groups, channels, eps=EPS, dtype=how.dtype)

    def __call__(self, x: jax.Array, context: Text | None = None) -> jax.Array:
        """Keep the shape (B, H, W, C)."""
        b, h, w, c = x.shape
        return x + super().__call__(self.group_norm(x).reshape(b, h * w, c), context).reshape(x.shape)


class MiddleBlock(nnx.Module):
    """Resnet, attention where configured, resnet."""

    def __init__(self, config: VaeConfig, *, how: Execution) -> None:
        width = config.channels[-1]
        self.attentions = (
            nnx.List([PixelAttention(width, config.groups, how=how)]) if config.mid_block_add_attention else None
        )
        self.resnets = nnx.List([_resnet(config, how)(width, width) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep the shape (B, h, w, C)."""
        x = self.resnets[0](x)
        if self.attentions is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class EncoderBlock(nnx.Module):
    """Resnets at one resolution, then a step down except at the coarsest."""

    def __init__(self, config: VaeConfig, level: int, *, how: Execution) -> None:
        out, before = config.channels[level], config.channels[max(level - 1, 0)]
        resnet = _resnet(config, how)
        self.resnets = nnx.List([resnet(before if i == 0 else out, out) for i in range(config.layers_per_block)])
        last = level == len(config.channels) - 1
        self.downsamplers = None if last else nnx.List([Downsample(out, 0, how=how)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, in) to (B, H/2, W/2, out)."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class DecoderBlock(nnx.Module):
    """Resnets at one resolution, then a step up except at the finest; `index` counts from the coarsest."""

    def __init__(self, config: VaeConfig, index: int, *, how: Execution) -> None:
        widths = config.channels[::-1]
        out, before = widths[index], widths[max(index - 1, 0)]
        resnet = _resnet(config, how)
        self.resnets = nnx.List([resnet(before if i == 0 else out, out) for i in range(config.layers_per_block + 1)])
        last = index == len(widths) - 1
        self.upsamplers = None if last else nnx.List([Upsample(out, how=how)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, h, w, in) to (B, 2h, 2w, out)."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class Encoder(nnx.Module):
    """Images to the moments of the latents."""

    def __init__(self, config: VaeConfig, *, how: Execution) -> None:
        first, last = config.channels[0], config.channels[-1]
        self.how = how
        self.conv_in = how.conv(config.in_channels, first, 3, padding=1)
        self.down_blocks = nnx.List([EncoderBlock(config, i, how=how) for i in range(len(config.channels))])
        self.mid_block = MiddleBlock(config, how=how)
        self.conv_norm_out = GroupNorm(config.groups, last, eps=EPS, dtype=how.dtype)
        self.conv_out = how.conv(last, 2 * config.latent_channels, 3, padding=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, 3) to (B, h, w, 2 latent_channels)."""
        x = self.how.constrain_batch(self.conv_in(x))
        for block in self.down_blocks:
            x = self.how.constrain_batch(block(x))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to images."""

    def __init__(self, config: VaeConfig, *, how: Execution) -> None:
        first, last = config.channels[0], config.channels[-1]
        self.how = how
        self.conv_in = how.conv(config.latent_channels, last, 3, padding=1)
        self.mid_block = MiddleBlock(config, how=how)
        self.up_blocks = nnx.List([DecoderBlock(config, i, how=how) for i in range(len(config.channels))])
        self.conv_norm_out = GroupNorm(config.groups, first, eps=EPS, dtype=how.dtype)
        self.conv_out = how.conv(first, config.out_channels, 3, padding=1)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Map (B, h, w, latent_channels) to (B, H, W, 3)."""
        x = self.how.constrain_batch(self.mid_block(self.conv_in(z)))
        for block in self.up_blocks:
            x = self.how.constrain_batch(block(x))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Vae(nnx.Module):
    """Encoder and decoder with the 1x1 convolutions between them and the latents."""

    def __init__(self, config: VaeConfig, *, how: Execution) -> None:
        c = config.latent_channels
        self.how = how
        self.encoder = Encoder(config, how=how)
        self.decoder = Decoder(config, how=how)
        self.quant_conv = how.conv(2 * c, 2 * c, 1) if config.use_quant_conv else None
        self.post_quant_conv = how.conv(c, c, 1) if config.use_post_quant_conv else None

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map images (B, H, W, 3) in -1..1 to mean and log variance of the latents, each (B, h, w, latent_channels)."""
        moments = self.encoder(images.astype(self.how.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Map latents (B, h, w, latent_channels), already divided by the scaling factor, to images of about -1..1."""
        z = latents.astype(self.how.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z)


def vae(config: VaeConfig, *, dtype: Any = jnp.float32, batch_sharding: NamedSharding | None = None) -> Network:
    """Describe the autoencoder as a function of its parameters, with the methods "encode" and "decode".

    ``batch_sharding`` is how the images of a batch are laid out over devices, see `Execution`.
    """
    how = Execution(dtype=jnp.dtype(dtype), batch_sharding=batch_sharding)
    return describe(Vae, config, how=how)
