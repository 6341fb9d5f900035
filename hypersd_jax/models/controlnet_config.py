"""The shape of a ControlNet, read from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypersd_jax.errors import UserError
from hypersd_jax.models.config_reading import natural, nonempty, per_block, require, with_defaults
from hypersd_jax.models.unet_config import DEFAULTS as UNET_DEFAULTS
from hypersd_jax.models.unet_config import NAME as UNET_NAME
from hypersd_jax.models.unet_config import UNetConfig

NAME = "ControlNetModel"

# Keys that a ControlNet has in common with the UNet whose encoder it copies.
SHARED = (
    "in_channels",
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "mid_block_type",
    "only_cross_attention",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "mid_block_scale_factor",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "attention_head_dim",
    "num_attention_heads",
    "use_linear_projection",
    "class_embed_type",
    "addition_embed_type",
    "addition_time_embed_dim",
    "num_class_embeds",
    "upcast_attention",
    "resnet_time_scale_shift",
    "projection_class_embeddings_input_dim",
    "addition_embed_type_num_heads",
)

DEFAULTS: dict[str, Any] = {
    **{key: UNET_DEFAULTS[key] for key in SHARED},
    "conditioning_channels": 3,
    "controlnet_conditioning_channel_order": "rgb",
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "global_pool_conditions": False,
}

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "controlnet_conditioning_channel_order": ("rgb", "bgr"),
    "global_pool_conditions": (False, True),
}


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """A ControlNet's structure.

    Attributes:
        encoder: the encoder half of the UNet that it was copied from; its settings of the blocks up mean nothing.
        conditioning_channels: channels of the image that conditions.
        embedding_channels: widths of the network that brings this image down to the latents' size.
        bgr: whether the network reads the image's channels in reverse order.
        global_pool: whether residuals are averaged over space, as for ControlNets that carry style and not layout;
            diffusers' pipelines then run the network for the conditional half alone.
    """

    encoder: UNetConfig
    conditioning_channels: int
    embedding_channels: tuple[int, ...]
    bgr: bool
    global_pool: bool

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return int(2 ** (len(self.embedding_channels) - 1))

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of the UNet's skips, to each of which one residual is added, the finest first."""
        levels = tuple(zip(self.encoder.channels, self.encoder.layers, strict=True))
        skips = [self.encoder.channels[0]]
        for level, (width, layers) in enumerate(levels):
            skips += [width] * (layers + (level < len(levels) - 1))
        return tuple(skips)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ControlNetConfig:
        """Read a config.json of any age; UserError names a key whose value is not supported."""
        c = with_defaults(config, DEFAULTS, NAME)
        require(c, NAME, SUPPORTED)
        # A whole UNet's configuration needs blocks up, which are not built here.
        up = ["UpBlock2D"] * len(nonempty(c, NAME, "down_block_types"))
        try:
            encoder = UNetConfig.from_dict({**{key: c[key] for key in SHARED}, "up_block_types": up})
        except UserError as error:
            raise UserError(str(error).replace(UNET_NAME, NAME)) from None
        key = "conditioning_embedding_out_channels"
        return cls(
            encoder=encoder,
            conditioning_channels=natural(c, NAME, "conditioning_channels"),
            embedding_channels=per_block(c, NAME, key, len(nonempty(c, NAME, key))),
            bgr=c["controlnet_conditioning_channel_order"] == "bgr",
            global_pool=c["global_pool_conditions"],
        )

    def require_fit(self, unet: UNetConfig, downscale: int) -> None:
        """Refuse, by key, a UNet whose skips the residuals do not fit, or an autoencoder of another downscale."""
        own = self.encoder
        pairs: dict[str, tuple[Any, Any]] = {
            # An inpainting UNet reads more than the latents, its ControlNets do not.
            "in_channels": (own.in_channels, unet.out_channels),
            "block_out_channels": (own.channels, unet.channels),
            "layers_per_block": (own.layers, unet.layers),
            "downsample_padding": (own.downsample_padding, unet.downsample_padding),
            "cross_attention_dim": (own.cross_attention_dims, unet.cross_attention_dims),
            "projection_class_embeddings_input_dim": (own.pooled_dim, unet.pooled_dim if own.text_time else 0),
            "conditioning_embedding_out_channels": (self.downscale, downscale),
        }
        for key, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise UserError(f"{NAME} config: {key} makes {_plain(ours)}, but the model has {_plain(theirs)}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
