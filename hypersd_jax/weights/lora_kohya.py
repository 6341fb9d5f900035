"""kohya's LoRA layout with diffusers' block names: what Hyper-SD, LCM-LoRA and DMD2 files are, and what every UI reads.

A key is a prefix for the component, the module path with underscores for dots, and one of three suffixes:

    lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight    (r, in, kh, kw)
    lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight      (out, r, 1, 1)
    lora_unet_down_blocks_0_resnets_0_conv1.alpha               scalar; the scale is alpha / r, absent means alpha = r

Underscores cannot be turned back into dots without knowing the model, so reading goes through an index of its modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hypersd_jax.weights.lora_factors import common_rank, to_torch

ROLES = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
"""Suffixes after the first dot of a key."""

READ_PREFIXES = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}


def module_index(shapes: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """``{name in a kohya file: (component, module path)}`` for every module that has a kernel.

    Args:
        shapes: ``{component: {parameter path: anything}}``.
    """
    index = {}
    for component, parameters in shapes.items():
        for path in parameters:
            if path.endswith(".kernel"):
                module = path.removesuffix(".kernel")
                for prefix in READ_PREFIXES.get(component, ()):
                    index[prefix + _underscored(component, module)] = (component, module)
    return index


def encode(
    component: str, adapter: Mapping[str, Mapping[str, Any]], *, dtype: Any, text_encoders: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The names and tensors of one component, three for each adapted module.

    Scales are folded into the up factors and alpha is the rank. Where ranks differ, all modules state the most common
    one as alpha: diffusers loses any other alpha of an attention module, as its names no longer match by then.

    Args:
        component: "unet", "text_encoder" or "text_encoder_2".
        adapter: ``{dotted module path: {"down", "up", "scale"}}``.
        dtype: of the factors; alpha is a float32 scalar.
        text_encoders: how many the model has: kohya calls the only one `lora_te` and the first of two `lora_te1`.
    """
    first_text_prefix = "lora_te_" if text_encoders == 1 else "lora_te1_"
    prefix = {"unet": "lora_unet_", "text_encoder": first_text_prefix, "text_encoder_2": "lora_te2_"}[component]
    alpha = common_rank(adapter)
    for module, entry in adapter.items():
        name = prefix + _underscored(component, module)
        down, up = to_torch(module, entry, dtype, alpha)
        yield f"{name}.alpha", np.array(alpha, np.float32)
        yield f"{name}.lora_down.weight", down
        yield f"{name}.lora_up.weight", up


def describe(adapters: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    """The header metadata by which UIs list a LoRA's rank; kohya writes "Dynamic" where ranks differ."""
    ranks = {entry["scale"].shape[0] for adapter in adapters.values() for entry in adapter.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}


def _underscored(component: str, module: str) -> str:
    if component != "unet" and not module.startswith(("text_model.", "text_projection")):
        module = "text_model." + module
    return module.replace(".", "_")
