"""The tiny autoencoder (TAESD, Bohan 2023): plain convolutions that imitate the large one on latents of the UNet."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from hypersd_jax.models.execution import Execution
from hypersd_jax.models.functional import Network, describe
from hypersd_jax.models.layers import activation
from hypersd_jax.models.vae import LOGVAR_RANGE
from hypersd_jax.models.vae_tiny_config import TinyVaeConfig

# Latents are squashed softly into +-3 before they are decoded.
CLAMP = 3.0


class Activation(nnx.Module):
    """An activation as a layer of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep the shape."""
        return activation(self.name)(x)


class Double(nnx.Module):
    """Twice the resolution by nearest neighbours."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, 2H, 2W, C)."""
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class TinyBlock(nnx.Module):
    """Three convolutions around a skip, and a ReLU over the sum."""

    def __init__(self, width: int, act_fn: str, *, how: Execution) -> None:
        def conv() -> nnx.Module:
            return how.conv(width, width, 3, padding=1)

        self.conv = nnx.List([conv(), Activation(act_fn), conv(), Activation(act_fn), conv()])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep the shape (B, H, W, C)."""
        y = x
        for layer in self.conv:
            y = layer(y)
        return jax.nn.relu(x + y)


class Stack(nnx.Module):
    """Layers one after the other, at the indices that the original gives them."""

    def __init__(self, layers: list[nnx.Module], how: Execution) -> None:
        self.how = how
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, in) to (B, H', W', out)."""
        for layer in self.layers:
            x = self.how.constrain_batch(layer(x))
        return x


def _encoder(config: TinyVaeConfig, how: Execution) -> Stack:
    width, layers = config.encoder_width, []
    for level, count in enumerate(config.encoder_blocks):
        layers.append(
            how.conv(width, width, 3, padding=1, stride=2, bias=False)
            if level
            else how.conv(config.in_channels, width, 3, padding=1)
        )
        layers += [TinyBlock(width, config.act_fn, how=how) for _ in range(count)]
    return Stack([*layers, how.conv(width, config.latent_channels, 3, padding=1)], how)


def _decoder(config: TinyVaeConfig, how: Execution) -> Stack:
    width = config.decoder_width
    layers = [how.conv(config.latent_channels, width, 3, padding=1), Activation(config.act_fn)]
    for level, count in enumerate(config.decoder_blocks):
        layers += [TinyBlock(width, config.act_fn, how=how) for _ in range(count)]
        if level < len(config.decoder_blocks) - 1:
            layers += [Double(), how.conv(width, width, 3, padding=1, bias=False)]
    return Stack([*layers, how.conv(width, config.out_channels, 3, padding=1)], how)


class TinyVae(nnx.Module):
    """Encoder and decoder, with the methods of `Vae`."""

    def __init__(self, config: TinyVaeConfig, *, how: Execution) -> None:
        self.how = how
        self.encoder = _encoder(config, how)
        self.decoder = _decoder(config, how)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map images (B, H, W, 3) in -1..1 to latents (B, h, w, latent_channels) and their log variance.

        The encoder is deterministic, so that the latter is the least that `Vae` knows, a standard deviation of 3e-7.
        """
        latents = self.encoder((images.astype(self.how.dtype) + 1) / 2)
        return latents, jnp.full_like(latents, LOGVAR_RANGE[0])

    def decode(self, latents: jax.Array) -> jax.Array:
        """Map latents (B, h, w, latent_channels), already divided by the scaling factor, to images of about -1..1."""
        z = latents.astype(self.how.dtype)
        return 2 * self.decoder(jnp.tanh(z / CLAMP) * CLAMP) - 1


def tiny_vae(
    config: TinyVaeConfig, *, dtype: Any = jnp.float32, batch_sharding: NamedSharding | None = None
) -> Network:
    """Describe the tiny autoencoder as a function of its parameters, with the methods and arguments of `vae`."""
    how = Execution(dtype=jnp.dtype(dtype), batch_sharding=batch_sharding)
    return describe(TinyVae, config, how=how)
