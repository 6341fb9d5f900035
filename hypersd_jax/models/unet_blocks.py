"""The blocks of the UNet: down, middle and up, each with or without transformers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hypersd_jax.models.attention import Transformer2D, TransformerShape
from hypersd_jax.models.attention_guidance import Text
from hypersd_jax.models.execution import Execution
from hypersd_jax.models.resnet import Downsample, ResnetBlock
from hypersd_jax.models.unet_config import UNetConfig
from hypersd_jax.models.upsample import Upsample


def _resnet(config: UNetConfig, how: Execution) -> partial[ResnetBlock]:
    return partial(
        ResnetBlock,
        time_dim=config.time_embedding_dim,
        groups=config.groups,
        eps=config.norm_eps,
        act_fn=config.act_fn,
        scale_shift=config.scale_shift,
        how=how,
    )


def _shape(config: UNetConfig, level: int, *, only_cross_attention: bool) -> TransformerShape:
    return TransformerShape(
        heads=config.heads[level],
        context_dim=config.cross_attention_dims[level],
        groups=config.groups,
        linear_projection=config.use_linear_projection,
        only_cross_attention=only_cross_attention,
    )


def _transformers(config: UNetConfig, level: int, layers: tuple[int, ...], how: Execution) -> nnx.List | None:
    """Make one transformer for each resnet of a block; None for a block without attention."""
    if not layers:
        return None
    shape = _shape(config, level, only_cross_attention=config.only_cross_attention[level])
    return nnx.List([Transformer2D(config.channels[level], n, shape, how=how) for n in layers])


class DownBlock(nnx.Module):
    """Resnets (each with its transformer) at one resolution, then a step down except at the coarsest."""

    def __init__(self, config: UNetConfig, level: int, *, how: Execution) -> None:
        self.how = how
        out = config.channels[level]
        before = config.channels[max(level - 1, 0)]
        resnet = _resnet(config, how)
        self.resnets = nnx.List([resnet(before if i == 0 else out, out) for i in range(config.layers[level])])
        self.attentions = _transformers(config, level, config.down_transformers[level], how)
        last = level == len(config.channels) - 1
        self.downsamplers = None if last else nnx.List([Downsample(out, config.downsample_padding, how=how)])

    def __call__(self, x: jax.Array, temb: jax.Array, context: Text) -> tuple[jax.Array, list[jax.Array]]:
        """Map (B, H, W, in) to the block's output and its skips, finest first."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self.how.run(resnet, x, temb)
            if self.attentions is not None:
                x = self.attentions[i](x, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.how.constrain_batch(self.downsamplers[0](x))
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """Resnet, transformer, resnet at the coarsest resolution; without attention one resnet alone."""

    def __init__(self, config: UNetConfig, *, how: Execution) -> None:
        self.how = how
        width = config.channels[-1]
        resnet = partial(_resnet(config, how), divisor=config.mid_block_scale_factor)
        attentive = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        self.resnets = nnx.List([resnet(width, width) for _ in range(2 if attentive else 1)])
        shape = _shape(config, -1, only_cross_attention=False)
        self.attentions = (
            nnx.List([Transformer2D(width, config.mid_transformers, shape, how=how)]) if attentive else None
        )

    def __call__(self, x: jax.Array, temb: jax.Array, context: Text) -> jax.Array:
        """Map (B, h, w, C) to (B, h, w, C)."""
        x = self.how.run(self.resnets[0], x, temb)
        if self.attentions is not None:
            x = self.attentions[0](x, context)
            x = self.how.run(self.resnets[1], x, temb)
        return x


class UpBlock(nnx.Module):
    """Resnets (each with its transformer) over the features and one skip each, then a step up except at the finest.

    `index` counts from the coarsest.
    """

    def __init__(self, config: UNetConfig, index: int, *, how: Execution) -> None:
        self.how = how
        levels = len(config.channels)
        level = levels - 1 - index
        out = config.channels[level]
        below = config.channels[min(level + 1, levels - 1)]
        finer = config.channels[max(level - 1, 0)]
        count = config.layers[level] + 1
        resnet = _resnet(config, how)
        self.resnets = nnx.List(
            [resnet((below if i == 0 else out) + (finer if i == count - 1 else out), out) for i in range(count)]
        )
        self.attentions = _transformers(config, level, config.up_transformers[index], how)
        self.upsamplers = None if level == 0 else nnx.List([Upsample(out, how=how)])

    def __call__(self, x: jax.Array, skips: list[jax.Array], temb: jax.Array, context: Text) -> jax.Array:
        """Map (B, h, w, in) to the resolution of the next skip, taking its own off the end of `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = self.how.run(resnet, jnp.concatenate([x, skips.pop()], axis=-1), temb)
            if self.attentions is not None:
                x = self.attentions[i](x, context)
        if self.upsamplers is not None:
            x = self.how.constrain_batch(self.upsamplers[0](x, skips[-1].shape[1:3]))
        return x
