"""What other programs make of a LoRA file: the scale that each gives every module, and what each leaves out.

Rules of diffusers 0.42, ComfyUI, AUTOMATIC1111 1.10 (Forge's loader is ComfyUI's) and sd-scripts, told in
docs/lora_formats.md. diffusers' are tested against diffusers itself, the names of the others against how CompVis's UNet
is built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hypersd_jax.weights.lora.kinds import Kind
from hypersd_jax.weights.lora.peft import HEADER_KEY

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_OUTSIDE_BLOCKS = ("conv_in", "conv_out", "time_embedding", "add_embedding", "conv_norm_out")
_KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_KOHYA = ("kohya", "kohya-sgm")


@dataclass(frozen=True, kw_only=True)
class Module:
    """One module of a LoRA file.

    Attributes:
        component: "unet", "text_encoder" or "text_encoder_2".
        path: dotted, of the base; where the base is not known, as the file spells it.
        key: the first of its keys.
        layout: as `LoraReport.layout` names it.
        kind: LoRA, LoHa, ...
        roles: of its tensors, see `weights.lora.kinds`.
        rank: None where it has none.
        alpha: as stated, by a tensor or a configuration; None where it is not.
        scale: alpha / rank, as this package applies it.
    """

    component: str
    path: str
    key: str
    layout: str
    kind: Kind
    roles: frozenset[str]
    rank: int | None
    alpha: float | None
    scale: float

    @property
    def tensor_scale(self) -> float:
        """The scale by its alpha tensor alone; 1 where it has none."""
        return self.scale if "alpha" in self.roles else 1.0


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A LoRA file as loaders see it.

    Attributes:
        modules: in the file's order.
        keys: all of the file's.
        metadata: the header's.
        is_xl: whether the base is SDXL; None where it is not known.
    """

    modules: Sequence[Module]
    keys: Sequence[str]
    metadata: Mapping[str, str]
    is_xl: bool | None


class Effect(NamedTuple):
    """What a loader makes of a module: its scale, None where it is left out, and why, or what of it is lost."""

    scale: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a loader makes of a file.

    Attributes:
        effects: one for each module.
        refused: why it refuses the whole file; None where it does not.
    """

    effects: Sequence[Effect]
    refused: str | None = None


def _refused(lora: Contents, reason: str) -> Reading:
    return Reading(effects=[Effect(None, reason)] * len(lora.modules), refused=reason)


def read_by_diffusers(lora: Contents) -> Reading:
    """`load_lora_weights` of a Stable Diffusion pipeline."""
    keys = [key for key in lora.keys if "dora_scale" not in key]
    if all(key.startswith(_KOHYA_PREFIXES) for key in keys):
        return _kohya_by_diffusers(lora)
    strange = next((key for key in keys if "lora" not in key), None)
    if strange is not None:
        return _refused(lora, f"it takes no key without 'lora' in it: {strange}")
    if any(module.layout in ("OneTrainer", "ComfyUI") and module.key.startswith("unet.") for module in lora.modules):
        return _refused(lora, "names that are not diffusers' after its prefix unet.")

    def effect(module: Module) -> Effect:
        if not module.key.startswith(f"{module.component}."):
            return Effect(None, f"keys without the prefix {module.component}.")
        return Effect(module.scale if HEADER_KEY in lora.metadata else 1.0)

    return Reading(effects=[effect(module) for module in lora.modules])


def _kohya_by_diffusers(lora: Contents) -> Reading:
    """kohya's keys are rewritten into diffusers' by text, and must be consumed to the last.

    Then PEFT gets one alpha, the most common, and the others by name; but the names of attention modules still have the
    factor's in them, and text encoders' a prefix that transformers dropped, so that these get the common one.
    """
    odd = next((module for module in lora.modules if module.kind.name != "LoRA" or module.kind.bias), None)
    odd = odd or next((module for module in lora.modules if "mid" in module.roles), None)
    if odd is not None:
        return _refused(lora, f"it reads pairs of factors alone, and not {odd.kind} ({odd.key})")
    sgm = [module.layout == "kohya-sgm" for module in lora.modules]
    both = any(sgm) and any(
        not each and module.component == "unet" for each, module in zip(sgm, lora.modules, strict=True)
    )
    if any(sgm) and not both and lora.is_xl is False:
        return _refused(lora, "it knows sgm's names for SDXL alone")
    alphas: dict[str, Counter[float]] = {}
    for module in lora.modules:
        if module.alpha is not None and "alpha" in module.roles:
            alphas.setdefault(module.component, Counter())[module.alpha] += 1
    common = {component: counted.most_common(1)[0][0] for component, counted in alphas.items()}
    text_out = {module.component for module in lora.modules if module.path.endswith("out_proj")}

    def effect(module: Module) -> Effect:
        if both and module.layout == "kohya-sgm":
            return Effect(None, "sgm's names where diffusers' are too")
        text = module.component != "unet"
        if text and module.component not in text_out and module.path.endswith(_TEXT_ATTENTION):
            return Effect(None, "attention of a text encoder without out_proj, by which it knows it")
        alpha: float | None = common.get(module.component)
        if module.alpha is not None and not text and not module.path.endswith(_ATTENTION):
            alpha = module.alpha
        scale = 1.0 if alpha is None or module.rank is None else alpha / module.rank
        return Effect(scale, "it drops DoRA's magnitude" if module.kind.dora else "")

    return Reading(effects=[effect(module) for module in lora.modules])


def read_by_comfyui(lora: Contents) -> Reading:
    """Its LoRA nodes: what finds no name in the model's list is left out, with a line in the log."""

    def effect(module: Module) -> Effect:
        if reason := _unknown_to_comfyui(module):
            return Effect(None, reason)
        lost = module.kind.dora and module.layout == "PEFT"
        return Effect(module.tensor_scale, "it drops DoRA's magnitude under PEFT's name" if lost else "")

    return Reading(effects=[effect(module) for module in lora.modules])


def _unknown_to_comfyui(module: Module) -> str:
    key = module.key
    if module.layout in (*_KOHYA, "ComfyUI"):
        return "sgm's names after lycoris_" if key.startswith("lycoris_") and module.layout == "kohya-sgm" else ""
    if module.layout == "OneTrainer":
        return "OneTrainer's names"
    if key.startswith("base_model.model."):
        return "PEFT's own prefix base_model.model."
    if module.component == "unet":
        if ".to_" in f".{module.path}" and ".processor." not in key:
            return "attention without .processor in its names"
        return ""
    if ".text_model." not in key or "_lora." in key:
        return "text encoder keys without text_model., or with to_q_lora"
    return ""


def read_by_webui(lora: Contents) -> Reading:
    """AUTOMATIC1111: kohya's names alone, diffusers' blocks renumbered."""

    def effect(module: Module) -> Effect:
        if module.layout not in _KOHYA or not module.key.startswith(_KOHYA_PREFIXES):
            return Effect(None, "names that are not kohya's")
        if _is_misplaced_text(module, lora.is_xl):
            return Effect(None, "a prefix of the text encoder that this base does not have")
        named = module.path.removeprefix("lora_unet_").replace("_", ".")
        if lora.is_xl and module.layout == "kohya" and named == "up.blocks.0.upsamplers.0.conv":
            return Effect(None, "SDXL's first upsampler under diffusers' name")
        return Effect(module.tensor_scale)

    return Reading(effects=[effect(module) for module in lora.modules])


def read_by_sd_scripts(lora: Contents) -> Reading:
    """kohya's sd-scripts: `networks.lora`, or LyCORIS's module for kinds beyond pairs of factors."""
    lycoris = any(
        module.kind.name != "LoRA" or module.kind.dora or module.kind.bias or "mid" in module.roles
        for module in lora.modules
    )

    def effect(module: Module) -> Effect:
        if module.layout not in _KOHYA or not module.key.startswith(_KOHYA_PREFIXES):
            return Effect(None, "names that are not kohya's")
        if module.layout == "kohya-sgm" and lora.is_xl is False:
            return Effect(None, "sgm's names, which it reads for SDXL alone")
        if _is_misplaced_text(module, lora.is_xl):
            return Effect(None, "a prefix of the text encoder that this base does not have")
        if not lycoris and module.component == "unet" and module.path.startswith(_OUTSIDE_BLOCKS):
            return Effect(None, "modules outside the blocks")
        return Effect(module.tensor_scale, "with network_module=lycoris.kohya" if lycoris else "")

    return Reading(effects=[effect(module) for module in lora.modules])


def _is_misplaced_text(module: Module, is_xl: bool | None) -> bool:
    """Whether a key has the prefix of SDXL's text encoders on another base, or the other way round."""
    if is_xl is None or module.component == "unet":
        return False
    return module.key.startswith("lora_te_") if is_xl else not module.key.startswith("lora_te_")


LOADERS: dict[str, Callable[[Contents], Reading]] = {
    "diffusers": read_by_diffusers,
    "ComfyUI": read_by_comfyui,
    "A1111": read_by_webui,
    "sd-scripts": read_by_sd_scripts,
}
"""Programs by the name that reports call them."""
