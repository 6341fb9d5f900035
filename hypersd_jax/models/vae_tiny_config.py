"""The shape of a tiny autoencoder, read from its config.json."""

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

NAME = "AutoencoderTiny"

DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": [64] * 4,
    "decoder_block_out_channels": [64] * 4,
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "latent_channels": 4,
    "upsampling_scaling_factor": 2,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "force_upcast": False,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    # diffusers writes the decoder's widths once more.
    "block_out_channels": None,
}

# Not listed are latent_magnitude and latent_shift, which only concern storing latents as bytes.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ACTIVATIONS,
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "force_upcast": (False,),
}


@dataclass(frozen=True, kw_only=True)
class TinyVaeConfig:
    """A tiny autoencoder's structure; each half has one width for all its resolutions.

    The fields that `VaeConfig` has too mean the same. `encoder_blocks` run from the finest resolution to the coarsest,
    `decoder_blocks` back.
    """

    in_channels: int
    out_channels: int
    encoder_width: int
    decoder_width: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    act_fn: str
    latent_channels: int
    scaling_factor: float
    shift_factor: float
    force_upcast: bool

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return int(2 ** (len(self.encoder_blocks) - 1))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TinyVaeConfig:
        """Read a config.json of any age; UserError names a key whose value is not supported."""
        c = with_defaults(config, DEFAULTS, NAME)
        require(c, NAME, SUPPORTED)
        count = len(nonempty(c, NAME, "num_encoder_blocks"))
        blocks = {key: per_block(c, NAME, key, count, least=0) for key in ("num_encoder_blocks", "num_decoder_blocks")}
        for key, numbers in blocks.items():
            require_layers(NAME, key, sum(numbers))
        return cls(
            in_channels=natural(c, NAME, "in_channels"),
            out_channels=natural(c, NAME, "out_channels"),
            encoder_width=_width(c, "encoder_block_out_channels", count),
            decoder_width=_width(c, "decoder_block_out_channels", count),
            encoder_blocks=blocks["num_encoder_blocks"],
            decoder_blocks=blocks["num_decoder_blocks"],
            act_fn=c["act_fn"],
            latent_channels=natural(c, NAME, "latent_channels"),
            scaling_factor=number(c, NAME, "scaling_factor", positive=True),
            shift_factor=number(c, NAME, "shift_factor"),
            force_upcast=c["force_upcast"],
        )


def _width(c: Mapping[str, Any], key: str, count: int) -> int:
    """Read the one width of a list; the original's layers do not fit together with several."""
    nonempty(c, NAME, key)
    widths = per_block(c, NAME, key, count)
    if len(set(widths)) > 1:
        raise UserError(f"{NAME} config: {key}={shown(c[key])} must be {count} times the same width")
    return int(widths[0])
