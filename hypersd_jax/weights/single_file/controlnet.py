"""A ControlNet in one .safetensors file without config.json, by diffusers' names or those of its original program.

Such a file says nothing of its structure. It copies the encoder of a UNet, so the model's own configuration tells most
of it, and the tensors tell where it differs: transformer depths, and the network that reads the image.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypersd_jax.errors import UserError
from hypersd_jax.models.controlnet_config import ControlNetConfig
from hypersd_jax.models.unet_config import UNetConfig
from hypersd_jax.weights.single_file.component import Read, read_part
from hypersd_jax.weights.single_file.keys import UNET, Stored, unet_locations
from hypersd_jax.weights.tensors import TensorFile, open_tensors

Spelling = Callable[[str], str]

PREFIX = "control_model."
"""The prefix of a ControlNet's keys in a checkpoint that holds the UNet too."""

EMBEDDING = "controlnet_cond_embedding"
POOLED = re.compile(r"_shuffle(_fp16)?$")
"""Names of files whose residuals are averaged over space, which no tensor shows; ComfyUI goes by them too."""


def open_controlnet_file(path: Path, unet_config: UNetConfig) -> tuple[ControlNetConfig, Read]:
    """Describe the ControlNet in a file that goes with a model of this UNet.

    Returns:
        Its structure, and what reads the parameters of the network of that structure.

    Raises:
        UserError: one line naming the file, and the key that is missing or fits nothing, here or when it is read.
    """
    file = open_tensors(path)
    keys = set(file.keys())
    if any(key.startswith("lora_controlnet") for key in keys):
        raise UserError(f"{path}: is a Control-LoRA, which is not supported")
    if any(key.startswith(PREFIX) for key in keys):
        keys = {key for key in keys if key.startswith(PREFIX)}
    spell = _spelling(keys, unet_config)
    config = ControlNetConfig(
        encoder=_encoder(keys, spell, unet_config),
        **_embedding(file, keys, spell),
        bgr=False,
        global_pool=POOLED.search(path.stem) is not None,
    )
    return config, read_part(file, keys, lambda key: Stored(key=spell(key)))


def _spelling(keys: set[str], unet_config: UNetConfig) -> Spelling:
    """Spell a canonical diffusers key as a file with these keys does."""
    prefix = PREFIX if any(key.startswith(PREFIX) for key in keys) else ""
    if f"{prefix}{EMBEDDING}.conv_in.weight" in keys:
        return lambda key: prefix + key
    hint = re.compile(rf"{re.escape(prefix)}input_hint_block\.(\d{{1,4}})\.weight")
    last = max((int(match[1]) for key in keys if (match := hint.fullmatch(key))), default=0)
    modules = (
        (rf"^{EMBEDDING}\.conv_in\.", lambda _: "input_hint_block.0."),
        (rf"^{EMBEDDING}\.conv_out\.", lambda _: f"input_hint_block.{last}."),
        # An activation stands between any two convolutions.
        (rf"^{EMBEDDING}\.blocks\.(\d+)\.", lambda match: f"input_hint_block.{2 * int(match[1]) + 2}."),
        (r"^controlnet_down_blocks\.(\d+)\.", lambda match: f"zero_convs.{match[1]}.0."),
        (r"^controlnet_mid_block\.", lambda _: "middle_block_out.0."),
    )

    def spell(key: str) -> str:
        for pattern, replacement in modules:
            name, count = re.subn(pattern, replacement, key)
            if count:
                return prefix + name
        return prefix + unet_locations([key], unet_config)[key].key.removeprefix(UNET)

    return spell


def _encoder(keys: set[str], spell: Spelling, unet: UNetConfig) -> UNetConfig:
    """The model's UNet with the attention that the file has, and without what only the UNet's time embedding reads."""

    def depth(module: str) -> int | None:
        """Transformer layers, None without the transformer."""
        if spell(f"{module}.norm.weight") not in keys:
            return None
        count = 0
        while spell(f"{module}.transformer_blocks.{count}.norm1.weight") in keys:
            count += 1
        return count

    down = [
        [depth(f"down_blocks.{level}.attentions.{i}") for i in range(layers)]
        for level, layers in enumerate(unet.layers)
    ]
    mid = depth("mid_block.attentions.0")
    added = unet.text_time and spell("add_embedding.linear_1.weight") in keys
    return dataclasses.replace(
        unet,
        in_channels=unet.out_channels,
        down_transformers=tuple(tuple(n for n in level if n is not None) for level in down),
        mid_block_type="UNetMidBlock2D" if mid is None else "UNetMidBlock2DCrossAttn",
        mid_transformers=mid or 0,
        time_cond_proj_dim=0,
        added_dim=unet.added_dim if added else 0,
        addition_time_embed_dim=unet.addition_time_embed_dim if added else 0,
    )


def _embedding(file: TensorFile, keys: set[str], spell: Spelling) -> dict[str, Any]:
    """Widths of the network that reads the image."""

    def shape(module: str) -> tuple[int, ...]:
        key = spell(f"{EMBEDDING}.{module}.weight")
        if key not in keys or len(file.shape(key)) != 4:
            raise UserError(f"{file.path}: holds no ControlNet (no {key} of four dimensions)")
        return file.shape(key)

    first, channels, *_ = shape("conv_in")
    widths = [first]
    # Every second convolution halves the resolution.
    while spell(f"{EMBEDDING}.blocks.{2 * len(widths) - 1}.weight") in keys:
        widths.append(shape(f"blocks.{2 * len(widths) - 1}")[0])
    return {"conditioning_channels": channels, "embedding_channels": tuple(widths)}
