"""Which LoRA keys other programs know, worked out from how CompVis's UNet is built rather than from our own tables.

`ldm_modules` walks the construction of the network (openaimodel.py of CompVis and Stability): a running list of input
blocks, a middle, a running list of output blocks. `comfyui_keys` and `webui_key` are what ComfyUI's
`model_lora_keys_unet` and AUTOMATIC1111's `convert_diffusers_name_to_compvis` then make of a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}


def ldm_blocks(config: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(module of diffusers, module of LDM, kind) for the blocks of a UNet configuration; kind says what is inside."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    down, up = (config[f"{way}_block_types"] for way in ("down", "up"))
    place = 1
    for level in range(levels):
        for layer in range(layers):
            yield f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{place}.0", "resnet"
            if "Attn" in down[level]:
                yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{place}.1", "attention"
            place += 1
        if level < levels - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{place}.0.op", "conv"
            place += 1
    yield "mid_block.resnets.0", "middle_block.0", "resnet"
    yield "mid_block.attentions.0", "middle_block.1", "attention"
    yield "mid_block.resnets.1", "middle_block.2", "resnet"
    place = 0
    for level in range(levels):
        for layer in range(layers + 1):
            parts = 1
            yield f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{place}.0", "resnet"
            if "Attn" in up[level]:
                yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{place}.1", "attention"
                parts = 2
            if level < levels - 1 and layer == layers:
                yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{place}.{parts}.conv", "conv"
            place += 1


def ldm_modules(config: dict[str, Any], modules: list[str]) -> dict[str, str]:
    """``{diffusers' module: LDM's}`` for those of a UNet's modules that lie in its blocks."""
    names = {}
    for ours, theirs, kind in ldm_blocks(config):
        for module in modules:
            if module == ours and kind == "conv":
                names[module] = theirs
            elif module.startswith(ours + ".") and kind != "conv":
                rest = module.removeprefix(ours + ".")
                shortcut = "skip_connection" if rest == "conv_shortcut" else rest
                names[module] = f"{theirs}.{RESNET.get(rest, shortcut) if kind == 'resnet' else rest}"
    return names


def comfyui_keys(config: dict[str, Any], modules: list[str]) -> dict[str, str]:
    """``{name before the first dot: LDM's module}`` of every name that ComfyUI looks for in a UNet's LoRA file."""
    known = {}
    for ours, theirs in ldm_modules(config, modules).items():
        known["lora_unet_" + theirs.replace(".", "_")] = theirs
        known["lora_unet_" + ours.replace(".", "_")] = theirs
        known["lycoris_" + ours.replace(".", "_")] = theirs
    return known


def webui_key(name: str) -> str:
    """LDM's module with underscores, as AUTOMATIC1111 1.10 reads a UNet name; sgm's names it takes as they are."""
    if match := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        way, level, kind, layer, rest = match.groups()
        number = int(level) * 3 + int(layer) + (way == "down")
        block = "input_blocks" if way == "down" else "output_blocks"
        return f"{block}_{number}_{int(kind == 'attentions')}_{_webui_suffix(kind, rest)}"
    if match := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        kind, layer, rest = match.groups()
        return f"middle_block_{1 if kind == 'attentions' else int(layer) * 2}_{_webui_suffix(kind, rest)}"
    if match := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"input_blocks_{3 + int(match[1]) * 3}_0_op"
    if match := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
        return f"output_blocks_{2 + int(match[1]) * 3}_{2 if int(match[1]) > 0 else 1}_conv"
    return name.removeprefix("lora_unet_")


def _webui_suffix(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    names = {**RESNET, "conv_shortcut": "skip_connection"}
    return names.get(rest, rest).replace(".", "_")
