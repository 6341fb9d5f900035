"""The shape of a Stable Diffusion UNet, read from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypersd_jax.errors import UserError, shown
from hypersd_jax.models.config_reading import (
    ACTIVATIONS,
    image_size,
    natural,
    nonempty,
    number,
    per_block,
    require,
    require_layers,
    with_defaults,
)

NAME = "UNet2DConditionModel"

# What a missing key means: older files hold a third of these.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}

# Keys of which only some values are ported. Not listed are those that cannot matter to the supported blocks: softmax is
# float32 whatever upcast_attention is, mid_block_only_cross_attention and addition_embed_type_num_heads are others'.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, True),
    "flip_sin_to_cos": (True, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "downsample_padding": (1, 0),
    "dropout": (0.0, 0),
    "act_fn": ACTIVATIONS,
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "use_linear_projection": (False, True),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0, 1),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None, *ACTIVATIONS),
    "timestep_post_act": (None, *ACTIVATIONS),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A UNet's structure, with every per-block setting spelled out.

    Tuples run from the finest to the coarsest resolution, `up_transformers` back. `heads` is the number of attention
    heads, which config.json calls `attention_head_dim`. `down_transformers[i][j]` is the number of transformer layers
    after resnet j of block i, empty for a block without attention. A dimension of 0 means that there is no such input.
    `sample_size` is a side of square latents or (height, width), 0 where the file names none.
    """

    sample_size: int | tuple[int, int]
    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    cross_attention_dims: tuple[int, ...]
    only_cross_attention: tuple[bool, ...]
    down_transformers: tuple[tuple[int, ...], ...]
    mid_block_type: str | None
    mid_transformers: int
    up_transformers: tuple[tuple[int, ...], ...]
    use_linear_projection: bool
    groups: int
    norm_eps: float
    act_fn: str
    scale_shift: bool
    downsample_padding: int
    mid_block_scale_factor: float
    center_input_sample: bool
    conv_in_kernel: int
    conv_out_kernel: int
    flip_sin_to_cos: bool
    freq_shift: float
    time_embedding_dim: int
    time_embedding_act_fn: str | None
    timestep_post_act: str | None
    time_cond_proj_dim: int
    addition_time_embed_dim: int
    added_dim: int

    @property
    def cross_attention_dim(self) -> int:
        """Width of the text context."""
        return self.cross_attention_dims[-1]

    @property
    def text_time(self) -> bool:
        """Whether the network takes SDXL's pooled text embedding and six time ids."""
        return self.added_dim > 0

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text embedding, 0 without one."""
        return self.added_dim - 6 * self.addition_time_embed_dim if self.text_time else 0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a config.json of any age; UserError names a key whose value is not supported."""
        c = with_defaults(config, DEFAULTS, NAME)
        require(c, NAME, SUPPORTED)
        down, up = nonempty(c, NAME, "down_block_types"), nonempty(c, NAME, "up_block_types")
        for key, types, known in (("down_block_types", down, DOWN_BLOCKS), ("up_block_types", up, UP_BLOCKS)):
            for kind in types:
                if kind not in known:
                    raise UserError(f"{NAME} config: {key} {shown(kind)} is not supported, only {' or '.join(known)}")
        count = len(down)
        if len(up) != count:
            raise UserError(f"{NAME} config: up_block_types has {len(up)} entries, down_block_types {count}")
        layers = per_block(c, NAME, "layers_per_block", count)
        require_layers(NAME, "layers_per_block", sum(layers))
        channels = per_block(c, NAME, "block_out_channels", count)
        heads = per_block(c, NAME, "attention_head_dim", count)
        groups = natural(c, NAME, "norm_num_groups")
        for width in channels:
            if width % groups:
                raise UserError(f"{NAME} config: norm_num_groups={groups} does not divide block_out_channels={width}")
        down_layers, mid_layers, up_layers = _transformer_layers(c, layers)
        for width, split, kinds in zip(channels, heads, zip(down, reversed(up), strict=True), strict=True):
            if width % split and any(kind.startswith("CrossAttn") for kind in kinds):
                raise UserError(f"{NAME} config: attention_head_dim={split} heads do not divide {width} channels")
        time_dim, added = _added(c)
        return cls(
            sample_size=image_size(c, NAME, "sample_size"),
            in_channels=natural(c, NAME, "in_channels"),
            out_channels=natural(c, NAME, "out_channels"),
            channels=channels,
            layers=layers,
            heads=heads,
            cross_attention_dims=per_block(c, NAME, "cross_attention_dim", count),
            only_cross_attention=per_block(c, NAME, "only_cross_attention", count, bool),
            down_transformers=tuple(n if t in DOWN_BLOCKS[:1] else () for n, t in zip(down_layers, down, strict=True)),
            mid_block_type=c["mid_block_type"],
            mid_transformers=mid_layers,
            up_transformers=tuple(n if t in UP_BLOCKS[:1] else () for n, t in zip(up_layers, up, strict=True)),
            use_linear_projection=c["use_linear_projection"],
            groups=groups,
            norm_eps=number(c, NAME, "norm_eps", positive=True),
            act_fn=c["act_fn"],
            scale_shift=c["resnet_time_scale_shift"] == "scale_shift",
            downsample_padding=c["downsample_padding"],
            mid_block_scale_factor=number(c, NAME, "mid_block_scale_factor", positive=True),
            center_input_sample=c["center_input_sample"],
            conv_in_kernel=natural(c, NAME, "conv_in_kernel"),
            conv_out_kernel=natural(c, NAME, "conv_out_kernel"),
            flip_sin_to_cos=c["flip_sin_to_cos"],
            freq_shift=number(c, NAME, "freq_shift"),
            time_embedding_dim=natural(c, NAME, "time_embedding_dim", optional=True) or 4 * channels[0],
            time_embedding_act_fn=c["time_embedding_act_fn"],
            timestep_post_act=c["timestep_post_act"],
            time_cond_proj_dim=natural(c, NAME, "time_cond_proj_dim", optional=True),
            addition_time_embed_dim=time_dim,
            added_dim=added,
        )


def _added(c: Mapping[str, Any]) -> tuple[int, int]:
    """Read the widths of one embedded time id and of all that SDXL adds: the pooled text and six time ids."""
    if c["addition_embed_type"] is None:
        return 0, 0
    key = "projection_class_embeddings_input_dim"
    one, added = natural(c, NAME, "addition_time_embed_dim"), natural(c, NAME, key)
    if added <= 6 * one:
        raise UserError(f"{NAME} config: {key}={added} leaves no room for pooled text beside six ids of {one}")
    return one, added


def _transformer_layers(
    c: Mapping[str, Any], layers: tuple[int, ...]
) -> tuple[list[tuple[int, ...]], int, list[tuple[int, ...]]]:
    """Spell out transformer layers: per down block and resnet, for the middle, per up block and resnet.

    An entry is one number for all resnets of a block or a list with one for each; without
    `reverse_transformer_layers_per_block` the way up mirrors the way down, one resnet more in each block.
    """
    key, reverse = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    value, back = c[key], c[reverse]
    if not isinstance(value, int | list | tuple):
        raise UserError(f"{NAME} config: {key}={shown(value)} is not an integer or a list with an entry for each block")
    down = [value] * len(layers) if isinstance(value, int) else value
    if back is None:
        if not isinstance(value, int) and any(not isinstance(entry, int) for entry in value):
            raise UserError(f"{NAME} config: {key}={shown(value)} needs {reverse}")
        up = list(reversed(down))
    else:
        up = [back] * len(layers) if isinstance(back, int) else back

    def spell(name: str, entries: Any, counts: list[int]) -> list[tuple[int, ...]]:
        if not isinstance(entries, list | tuple) or len(entries) != len(counts):
            raise UserError(f"{NAME} config: {name}={shown(entries)} needs {len(counts)} entries, one for each block")
        spelled = [
            per_block({name: entry}, NAME, name, count, least=0) for entry, count in zip(entries, counts, strict=True)
        ]
        require_layers(NAME, name, sum(map(sum, spelled)))
        return spelled

    spelled = spell(key, down, list(layers))
    return spelled, spelled[-1][0], spell(reverse, up, [count + 1 for count in reversed(layers)])
