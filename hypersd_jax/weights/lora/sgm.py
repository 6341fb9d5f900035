"""The names that CompVis's and Stability's own code (LDM, sgm) gives the modules of a UNet.

kohya's trainers write SDXL LoRAs under these, ComfyUI saves with them. They number the layers of all levels through:

    down_blocks.1.attentions.0    input_blocks.4.1       a resnet is .0 of its block, the attention after it .1
    down_blocks.0.downsamplers.0.conv    input_blocks.3.0.op
    up_blocks.0.upsamplers.0.conv        output_blocks.2.2.conv     .1.conv where the block has no attention
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

SDXL_ONLY = "add_embedding.linear_1.kernel"
"""A parameter by which a UNet is known to be SDXL's, the only one whose LoRAs other programs name like this."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def sgm_names(modules: Iterable[str]) -> dict[str, str]:
    """``{our path: sgm's}`` of the UNet modules that have such a name.

    Args:
        modules: all of the UNet's, for the numbers follow from how many layers each block has.
    """
    modules = list(modules)
    blocks = dict(_blocks({tuple(module.split(".")) for module in modules}))
    names = {}
    for module in modules:
        if module in _OUTSIDE:
            names[module] = _OUTSIDE[module]
            continue
        parts = module.split(".")
        size = 3 if parts[0] == "mid_block" else 4
        block, rest = blocks.get(".".join(parts[:size])), ".".join(parts[size:])
        if block is not None:
            kind = parts[size - 2]
            if kind == "downsamplers":
                rest = "op"
            names[module] = f"{block}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"
    return names


def spellings(name: str) -> tuple[str, ...]:
    """All ways to spell one of `sgm_names`: OneTrainer counts an attention before every upsampler of SD 1.x and 2.x."""
    if name.startswith("output_blocks.") and name.endswith(".1.conv"):
        return name, name.removesuffix(".1.conv") + ".2.conv"
    return (name,)


def _blocks(modules: set[tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """(our name, sgm's) of every resnet, attention, down- and upsampler that there may be."""
    parts = {module[:4] for module in modules}

    def layers(block: str, index: int) -> int:
        return len({part[3] for part in parts if part[:3] == (block, str(index), "resnets")})

    number = 1
    for i in itertools.takewhile(lambda i: layers("down_blocks", i), itertools.count()):
        for j in range(layers("down_blocks", i)):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        if ("down_blocks", str(i), "downsamplers", "0") in parts:
            yield f"down_blocks.{i}.downsamplers.0", f"input_blocks.{number}.0"
            number += 1
    for index, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"mid_block.{name}", f"middle_block.{index}"
    number = 0
    for i in itertools.takewhile(lambda i: layers("up_blocks", i), itertools.count()):
        for j in range(layers("up_blocks", i)):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"
            number += 1
        attends = any(part[:3] == ("up_blocks", str(i), "attentions") for part in parts)
        yield f"up_blocks.{i}.upsamplers.0", f"output_blocks.{number - 1}.{2 if attends else 1}"
