"""kohya's LoRA layout, which every user interface reads: Hyper-SD, LCM-LoRA and DMD2 files, and LyCORIS's kinds.

A key is a prefix for the component, the module path with underscores for dots, and a suffix:

    lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight    (r, in, kh, kw)
    lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight      (out, r, 1, 1)
    lora_unet_down_blocks_0_resnets_0_conv1.alpha               scalar; the scale is alpha / r, absent means alpha = r

The path is diffusers' or, in SDXL files of kohya's trainers, sgm's (`lora_unet_input_blocks_1_0_in_layers_2`).
SimpleTuner's prefix is `lycoris_`; ComfyUI saves `diffusion_model.` and sgm's path with dots, OneTrainer `unet.` and
sgm's path with dots, `clip_l.` and `clip_g.` for the text encoders (its "OMI" format; earlier `lora_unet.`,
`lora_clip_l.`), or dots in kohya's own names.

Underscores cannot be turned back into dots without knowing the model, so reading goes through an index of its modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hypersd_jax.errors import UserError
from hypersd_jax.weights.lora.factors import common_rank, to_torch
from hypersd_jax.weights.lora.kinds import LOHA, LOKR
from hypersd_jax.weights.lora.layout import Destination, Found, Key, Layout, Match, Shapes
from hypersd_jax.weights.lora.sgm import SDXL_ONLY, sgm_names, spellings
from hypersd_jax.weights.lora.unsupported import unsupported

if TYPE_CHECKING:
    from hypersd_jax.adapters import Adapter
    from hypersd_jax.weights.tensors import TensorFile

ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "diff": "full",
    "diff_b": "bias",
    "w_norm": "full",
    "b_norm": "bias",
    **{role: role for role in (*LOHA, "hada_t1", "hada_t2", *LOKR)},
}
"""Suffixes of a key and what they are to its module."""

PREFIXES = {
    "unet": ("lora_unet", "lycoris", "unet", "diffusion_model", "model.diffusion_model"),
    "text_encoder": (
        "lora_te",
        "lora_te1",
        "text_encoder",
        "clip_l",
        "lora_clip_l",
        "text_encoders.clip_l.transformer",
        "text_encoders.clip_h.transformer",
    ),
    "text_encoder_2": ("lora_te2", "text_encoder_2", "clip_g", "lora_clip_g", "text_encoders.clip_g.transformer"),
}
"""The prefix of a component's keys, by kohya, SimpleTuner, OneTrainer and ComfyUI."""

UNSPELLED = ("lora_", "lycoris_", "diffusion_model.", "text_encoders.")
"""The prefixes of keys that do not spell out the module's path as diffusers does."""

_COMFY = ("diffusion_model.", "model.diffusion_model.", "text_encoders.")
_STARTS = tuple(f"{prefix}{mark}" for prefixes in PREFIXES.values() for prefix in prefixes for mark in "._")
_SUFFIX = re.compile(rf"(?P<name>.+?)\.(?P<suffix>{'|'.join(map(re.escape, ROLES))})")


class Target(NamedTuple):
    """A module of the base, and whether the name that led to it is sgm's."""

    component: str
    module: str
    sgm: bool


def parse(key: str) -> tuple[str, str] | None:
    """(name of the module in the file, role); None for keys of other layouts."""
    match = _SUFFIX.fullmatch(key)
    if match is None or not key.startswith(_STARTS):
        return None
    return match["name"], ROLES[match["suffix"]]


def module_index(shapes: Mapping[str, Mapping[str, Any]], leaf: str = "kernel") -> dict[str, Target]:
    """``{name in a file, underscores for dots: target}`` for every module that has a `leaf`; see `find`.

    Args:
        shapes: ``{component: {parameter path: anything}}``.
        leaf: "kernel", or "scale" for the norms.
    """
    index: dict[str, Target] = {}
    for component, parameters in shapes.items():
        prefixes = [prefix.replace(".", "_") for prefix in PREFIXES.get(component, ())]
        every = {path.rpartition(".")[0] for path in parameters}
        sgm = sgm_names(every) if component == "unet" else {}
        for module in (path.removesuffix("." + leaf) for path in parameters if path.endswith("." + leaf)):
            spelled = [(_underscored(component, module), False)]
            spelled += [(name.replace(".", "_"), True) for name in spellings(sgm[module])] if module in sgm else []
            for name, is_sgm in spelled:
                index |= {f"{prefix}_{name}": Target(component, module, is_sgm) for prefix in prefixes}
    return index


def find(index: Mapping[str, Target], name: str) -> Target | None:
    """The module that a file calls by this name, with dots or underscores; None where the base has none such."""
    return index.get(name.replace(".", "_"))


def matcher(_: TensorFile, shapes: Shapes) -> Match:
    """Match keys with kohya's factors, under any program's names, with the modules of a base."""
    index, norms = module_index(shapes), module_index(shapes, "scale")

    def match(key: str) -> Found | None:
        parsed = parse(key)
        if parsed is None or unsupported(key):
            return None
        name, role = parsed
        target = find(index, name)
        if target is None and role in ("full", "bias"):
            target = find(norms, name)
        return Found(
            key=Key(component=None, module=name, role=role, layout=layout_of(name, target)),
            target=None if target is None else (target.component, target.module),
        )

    return match


def layout_of(name: str, target: Target | None) -> str:
    """The name of the layout in which a module with kohya's factors is called so."""
    if name.startswith(_COMFY):
        return "ComfyUI"
    if "." in name:
        return "OneTrainer"
    return "kohya-sgm" if target is not None and target.sgm else "kohya"


def encode(
    component: str,
    adapter: Mapping[str, Mapping[str, Any]],
    *,
    dtype: Any,
    text_encoders: int,
    names: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """The names and tensors of one component, three for each adapted module.

    Scales are folded into the up factors and alpha is the rank. Where ranks differ, all modules state the most common
    one as alpha: diffusers loses any other alpha of an attention module, as its names no longer match by then.

    Args:
        component: "unet", "text_encoder" or "text_encoder_2".
        adapter: ``{dotted module path: {"down", "up", "scale"}}``.
        dtype: of the factors; alpha is a float32 scalar.
        text_encoders: how many the model has: kohya calls the only one `lora_te` and the first of two `lora_te1`.
        names: other paths for the UNet's modules, such as `sgm_names`; None writes diffusers'.
    """
    first_text_prefix = "lora_te_" if text_encoders == 1 else "lora_te1_"
    prefix = {"unet": "lora_unet_", "text_encoder": first_text_prefix, "text_encoder_2": "lora_te2_"}[component]
    alpha = common_rank(adapter)
    for module, entry in adapter.items():
        path = names[module] if names is not None and component == "unet" else module
        name = prefix + _underscored(component, path)
        down, up = to_torch(module, entry, dtype, alpha)
        yield f"{name}.alpha", np.array(alpha, np.float32)
        yield f"{name}.lora_down.weight", down
        yield f"{name}.lora_up.weight", up


def describe(adapters: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    """The header metadata by which UIs list a LoRA's rank; kohya writes "Dynamic" where ranks differ."""
    ranks = {entry["scale"].shape[0] for adapter in adapters.values() for entry in adapter.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}


def base_version(shapes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The header metadata by which A1111 sorts LoRAs and hides those of other families; {} for an unknown family.

    Args:
        shapes: ``{component: {parameter path: object with .shape}}`` of the base.
    """
    unet = shapes.get("unet", {})
    widths = {value.shape[-2] for path, value in unet.items() if path.endswith("attn2.to_k.kernel")}
    family = "sdxl_base_v1-0" if SDXL_ONLY in unet else {(768,): "sd_v1", (1024,): "sd_v2"}.get(tuple(widths))
    return {} if family is None else {"ss_base_model_version": family}


def _underscored(component: str, module: str) -> str:
    return (module if component == "unet" else _prefixed(module)).replace(".", "_")


def _prefixed(module: str) -> str:
    """A text encoder's module with transformers' `text_model.`."""
    return module if module.startswith(("text_model.", "text_projection")) else "text_model." + module


def _encode(component: str, adapter: Adapter, to: Destination) -> Iterator[tuple[str, np.ndarray]]:
    return encode(component, adapter, dtype=to.dtype, text_encoders=to.text_encoders)


def _encode_sgm(component: str, adapter: Adapter, to: Destination) -> Iterator[tuple[str, np.ndarray]]:
    unet = {} if to.shapes is None else to.shapes.get("unet", {})
    if SDXL_ONLY not in unet:
        raise UserError("only SDXL's LoRAs have sgm block names (kohya-sgm); write this one as kohya")
    names = sgm_names({parameter.rpartition(".")[0] for parameter in unet})
    return encode(component, adapter, dtype=to.dtype, text_encoders=to.text_encoders, names=names)


KOHYA = Layout(
    name="kohya",
    matcher=matcher,
    encode=_encode,
    describe=describe,
    about_base=base_version,
    about_factors=(
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
        "sshs_model_hash",
        "sshs_legacy_hash",
    ),
)
KOHYA_SGM = Layout(name="kohya-sgm", encode=_encode_sgm, describe=describe, about_base=base_version)
"""Keys under sgm's names are read as kohya's."""
