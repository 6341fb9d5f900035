"""The names of the original Stable Diffusion files (CompVis' LDM, Stability's sgm) as tables that read both ways.

Four tables turn a canonical diffusers or transformers key into where a single file keeps it:

| network       | prefix                                   | differs in                                        |
|---------------|------------------------------------------|---------------------------------------------------|
| UNet          | `model.diffusion_model.`                 | one running number for all blocks of a direction  |
| autoencoder   | `first_stage_model.`                     | decoder blocks count backwards; attention is conv |
| OpenAI's CLIP | `cond_stage_model.transformer.` or sgm's | nothing                                           |
| OpenCLIP      | `cond_stage_model.model.` or sgm's       | q, k, v in one tensor; projection transposed      |

The UNet's table depends on its configuration, so that it serves any number of levels and layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hypersd_jax.models.unet import UNetConfig

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
CLIP_XL = "conditioner.embedders.0.transformer."
OPEN_CLIP_XL = "conditioner.embedders.1.model."

ALIASES: tuple[tuple[str, str], ...] = (
    # transformers 5 writes CLIP's keys without `text_model.`, and so did a release of 2022.
    (rf"^({re.escape(CLIP)}|{re.escape(CLIP_XL)})(?=(?:embeddings|encoder|final_layer_norm)\.)", r"\1text_model."),
    # SD-Turbo is SD 2.1 written by Stability's newer program.
    (r"^conditioner\.embedders\.0\.model\.", OPEN_CLIP),
    # Converters that did not know diffusers' newer names of the autoencoder's attention let them through.
    (r"^(first_stage_model\.\w+\.mid\.attn_1)\.to_([qkv])\.", r"\1.\2."),
    (r"^(first_stage_model\.\w+\.mid\.attn_1)\.to_out\.0\.", r"\1.proj_out."),
    (rf"^({re.escape(OPEN_CLIP_XL)}text_projection)\.weight$", r"\1"),
)
"""(pattern, replacement) pairs that turn a stored key into the canonical one."""

FLIPPED = f"{OPEN_CLIP_XL}text_projection.weight"
"""A stored key that some programs use for `text_projection`, in transformers' layout: (out, in) for (in, out)."""

IGNORED = re.compile(
    r"^model_ema\.|^(?:cond_stage_model|first_stage_model)\.(?:model_ema|loss)\.|^loss\.|^embedding_manager\."
    r"|^(?:betas|logvar|lvlb_weights|scale_factor|global_step|epoch|v_pred|ztsnr|denoiser\.sigmas)$"
    r"|^(?:sqrt_|log_)?(?:one_minus_)?alphas_cumprod(?:_prev)?$|^sqrt_recip(?:m1)?_alphas_cumprod$|^posterior_\w+$"
    r"|\.position_ids$|\.logit_scale$|\.attn_mask$"
    # A joint-space projection that the pipelines leave out: SD 2.x's, and CLIP-L's in files merged by some programs.
    r"|^cond_stage_model\.model\.text_projection$|^(?:cond_stage_model|conditioner\.embedders\.0)\.(?:transformer\.)?"
    r"text_projection(?:\.weight)?$"
)
"""Stored keys that no network needs: training state, buffers, moving averages."""

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Layers of a UNet's resnet: diffusers -> LDM."""

VAE_MODULES: tuple[tuple[str, str], ...] = (
    (r"^(encoder|decoder)\.mid_block\.attentions\.0\.group_norm\.", r"\1.mid.attn_1.norm."),
    (r"^(encoder|decoder)\.mid_block\.attentions\.0\.to_([qkv])\.", r"\1.mid.attn_1.\2."),
    (r"^(encoder|decoder)\.mid_block\.attentions\.0\.to_out\.0\.", r"\1.mid.attn_1.proj_out."),
    (r"^(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.mid.block_1."),
    (r"^(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.mid.block_2."),
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.up.\1.block."),
    (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"^(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
)
"""Modules of the autoencoder: diffusers -> LDM, but for the direction in which the decoder's blocks count."""

OPEN_CLIP_MODULES: tuple[tuple[str, str], ...] = (
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.in_proj_"),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^visual_projection\.weight$", "visual.proj"),
)
"""Modules of a CLIP's towers: transformers -> OpenCLIP."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The location and form of one tensor of a diffusers model in a single file.

    Attributes:
        key: the name in the file.
        part: 0, 1 or 2: q, k or v within a tensor that holds all three, one below the other; None otherwise.
        transposed: stored as (in, out).
        pointwise: stored with a 1x1 window, (out, in, 1, 1).
    """

    key: str
    part: int | None = None
    transposed: bool = False
    pointwise: bool = False

    @classmethod
    def named(cls, key: str) -> Stored:
        """A tensor that the file keeps as transformers or diffusers does."""
        return cls(key=key)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a tensor that has this one in diffusers."""
        if self.part is not None:
            return (3 * shape[0], *shape[1:])
        if self.transposed:
            return shape[::-1]
        return (*shape, 1, 1) if self.pointwise else shape

    def take(self, stored: np.ndarray) -> np.ndarray:
        """The tensor as diffusers has it, but for a 1x1 window, out of what the file holds."""
        part = stored if self.part is None else np.split(stored, 3)[self.part]
        return part.T if self.transposed else part


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """Modules of the UNet: diffusers -> LDM, without the prefix.

    LDM numbers the resnets (each with its transformer) and steps down of all levels in one row, those of the way up in
    another; a step up is the last entry of the block before it.
    """
    modules = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        # LDM has no guidance embedding. Files of LCMs keep diffusers' name, and most programs pass it over.
        "time_embedding.cond_proj": "time_embedding.cond_proj",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    number, levels = 1, len(config.channels)
    for level, layers in enumerate(config.layers):
        for layer in range(layers):
            modules[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            modules[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if level < levels - 1:
            modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for block, (layers, transformers) in enumerate(zip(reversed(config.layers), config.up_transformers, strict=True)):
        for layer in range(layers + 1):
            modules[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            modules[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        if block < levels - 1:
            position = 2 if transformers else 1
            modules[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{position}.conv"
    return modules


def unet_locations(keys: Iterable[str], config: UNetConfig) -> dict[str, Stored]:
    """Canonical diffusers keys of the UNet -> where the file has them."""
    modules = unet_modules(config)
    locations = {}
    for key in keys:
        parts = key.split(".")
        count = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules)
        layer, *rest = parts[count:]
        module = UNET + modules[".".join(parts[:count])]
        locations[key] = Stored(key=".".join([module, RESNET.get(layer, layer), *rest]))
    return locations


def vae_locations(keys: Iterable[str], levels: int) -> dict[str, Stored]:
    """Canonical diffusers keys of the autoencoder -> where the file has them."""
    locations = {}
    for key in keys:
        name = _renamed(key, VAE_MODULES)
        name = re.sub(r"^(decoder\.up)\.(\d+)", lambda found: f"{found[1]}.{levels - 1 - int(found[2])}", name)
        pointwise = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name) is not None
        locations[key] = Stored(key=VAE + name, pointwise=pointwise)
    return locations


def clip_locations(keys: Iterable[str], prefix: str) -> dict[str, Stored]:
    """Canonical transformers keys of OpenAI's text encoder -> where the file has them."""
    return {key: Stored(key=prefix + key) for key in keys}


def open_clip_locations(keys: Iterable[str], prefix: str) -> dict[str, Stored]:
    """Canonical transformers keys of OpenCLIP's towers -> where the file has them."""
    return {key: open_clip_place(key, prefix) for key in keys}


def open_clip_place(key: str, prefix: str = "") -> Stored:
    """The location in OpenCLIP's layout of a canonical transformers key of either tower."""
    fused = re.search(r"\.self_attn\.([qkv])_proj\.", key)
    return Stored(
        key=prefix + _renamed(key, OPEN_CLIP_MODULES),
        part="qkv".index(fused[1]) if fused else None,
        transposed=key in ("text_projection.weight", "visual_projection.weight"),
    )


def is_open_clip(keys: Iterable[str]) -> bool:
    """Tell whether these are the tensors of a whole CLIP in OpenCLIP's layout."""
    return "visual.conv1.weight" in keys


def canonical(key: str) -> str:
    """The canonical spelling of a key as stored in a single file."""
    return _renamed(key, ALIASES)


def _renamed(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        key = re.sub(pattern, replacement, key, count=1)
    return key
