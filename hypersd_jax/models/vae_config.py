"""The shape of an autoencoder, read from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypersd_jax.errors import UserError, shown
from hypersd_jax.models.config_reading import (
    ACTIVATIONS,
    natural,
    nonempty,
    number,
    per_block,
    require,
    require_layers,
    with_defaults,
)

NAME = "AutoencoderKL"

DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ACTIVATIONS,
    "latents_mean": (None,),
    "latents_std": (None,),
    "force_upcast": (True, False),
    "use_quant_conv": (True, False),
    "use_post_quant_conv": (True, False),
    "mid_block_add_attention": (True, False),
}


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """An autoencoder's structure.

    Latents as the UNet sees them are `(z - shift_factor) * scaling_factor`. `force_upcast` marks weights that overflow
    in float16, which is why `load_components` keeps those in float32.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers_per_block: int
    act_fn: str
    latent_channels: int
    groups: int
    scaling_factor: float
    shift_factor: float
    force_upcast: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return int(2 ** (len(self.channels) - 1))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VaeConfig:
        """Read a config.json of any age; UserError names a key whose value is not supported."""
        c = with_defaults(config, DEFAULTS, NAME)
        require(c, NAME, SUPPORTED)
        count = len(nonempty(c, NAME, "block_out_channels"))
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if nonempty(c, NAME, key) != [kind] * count:
                given = shown(c[key])
                raise UserError(f"{NAME} config: {key}={given} is not supported, only {count} times {kind!r}")
        channels = per_block(c, NAME, "block_out_channels", count)
        layers, groups = natural(c, NAME, "layers_per_block"), natural(c, NAME, "norm_num_groups")
        require_layers(NAME, "layers_per_block", count * layers)
        for width in channels:
            if width % groups:
                raise UserError(f"{NAME} config: norm_num_groups={groups} does not divide block_out_channels={width}")
        return cls(
            in_channels=natural(c, NAME, "in_channels"),
            out_channels=natural(c, NAME, "out_channels"),
            channels=channels,
            layers_per_block=layers,
            act_fn=c["act_fn"],
            latent_channels=natural(c, NAME, "latent_channels"),
            groups=groups,
            scaling_factor=number(c, NAME, "scaling_factor", positive=True),
            shift_factor=0.0 if c["shift_factor"] is None else number(c, NAME, "shift_factor"),
            force_upcast=c["force_upcast"],
            use_quant_conv=c["use_quant_conv"],
            use_post_quant_conv=c["use_post_quant_conv"],
            mid_block_add_attention=c["mid_block_add_attention"],
        )
