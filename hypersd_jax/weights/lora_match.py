"""Which key of a LoRA file belongs to which module of the base; what fits nothing is refused here, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypersd_jax.errors import UserError
from hypersd_jax.weights import lora_kohya, lora_peft
from hypersd_jax.weights.lora_factors import fits
from hypersd_jax.weights.tensors import TensorFile

Shapes = Mapping[str, Mapping[str, Any]]
"""``{component: {parameter path: object with .shape}}``."""

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

# What is recognised only to be refused by name.
_UNSUPPORTED = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.hada_", "LoHa"),
        (r"\.lokr_", "LoKr"),
        (r"\.dora_scale$|\.lora_magnitude_vector", "DoRA"),
        (r"\.lora_mid\.", "Tucker-decomposed convolution (lora_mid)"),
        (r"\.diff(_b)?$|\.set_weight$", "full difference"),
        (r"\.(oft_|boft_)", "OFT"),
        (r"\.(a1|a2|b1|b2)\.weight$", "GLoRA"),
        (r"\.[wb]_norm$", "norm difference"),
        (r"\.lora_embedding_[AB]$", "embedding LoRA"),
        (r"\.lora_[AB]\.bias$|\.lora_(down|up)\.bias$|\.lora_bias$", "LoRA with biases"),
        (
            r"^lora_unet_(input_blocks|middle_block|output_blocks|time_embed_\d|label_emb|out_2)",
            "kohya with sgm block names",
        ),
        (r"^(lora_transformer_|lora_te3_|transformer\.|diffusion_model\.)", "a transformer model's LoRA (FLUX, SD3)"),
    )
)


@dataclass(kw_only=True)
class Slot:
    """The keys that one module of the base takes its factors from.

    Attributes:
        name: the module as the file spells it, without component.
        layout: "kohya", "PEFT" or "diffusers".
        component: as the file names it; None where it does not.
        keys: ``{"down", "up" or "alpha": key}``.
    """

    name: str
    layout: str
    component: str | None = None
    keys: dict[str, str] = field(default_factory=dict)


Slots = dict[tuple[str, str], Slot]


def assign(tensors: TensorFile, shapes: Shapes) -> Slots:
    """The module of the base and the role of every key of the file.

    Raises:
        UserError: a key is of an unsupported kind, matches no module, matches one twice, lacks its partner, or has the
            wrong shape; or the file is no LoRA at all.
    """
    keys = tensors.keys()
    _refuse_unsupported(tensors.path, keys)
    index = lora_kohya.module_index(shapes)
    bare = _component_of_bare_keys(tensors, shapes)
    slots: Slots = {}
    unknown: list[str] = []
    recognised = 0
    for key in keys:
        name, _, suffix = key.partition(".")
        dotted = lora_peft.parse(key)
        target: tuple[str, str] | None = None
        if name.startswith("lora_") and suffix in lora_kohya.ROLES:
            target, role = index.get(name), lora_kohya.ROLES[suffix]
            slot = Slot(name=name, layout="kohya")
        elif dotted is not None:
            component = dotted.component or bare
            module = lora_peft.locate(component, dotted.module, shapes.get(component, {}))
            target, role = None if module is None else (component, module), dotted.role
            slot = Slot(name=dotted.module, layout=dotted.layout, component=dotted.component)
        else:
            unknown.append(key)
            continue
        recognised += 1
        if target is None:
            unknown.append(key)
            continue
        slot = slots.setdefault(target, slot)
        if role in slot.keys:
            raise UserError(f"{tensors.path}: {slot.keys[role]} and {key} are both for {'.'.join(target)}")
        slot.keys[role] = key
    if not recognised:
        raise UserError(f"{tensors.path}: is not a LoRA file: {listing(keys) or 'it holds no tensors'}")
    if unknown:
        hint = _family_hint(tensors, shapes)
        raise UserError(f"{tensors.path}: no such module in this base{hint}: {listing(unknown)}")
    incomplete = [next(iter(slot.keys.values())) for slot in slots.values() if not {"down", "up"} <= slot.keys.keys()]
    if incomplete:
        raise UserError(f"{tensors.path}: a down or up factor is missing beside {listing(incomplete)}")
    _refuse_misfits(tensors, slots, shapes)
    return slots


def _component_of_bare_keys(tensors: TensorFile, shapes: Shapes) -> str:
    """Which component the keys without one belong to: the first that has all their modules with the right widths."""
    keys = tensors.keys()
    parsed = [(key, dotted) for key in keys if (dotted := lora_peft.parse(key)) and not dotted.component]

    def has_all(component: str) -> bool:
        for key, dotted in parsed:
            module = lora_peft.locate(component, dotted.module, shapes[component])
            if module is None:
                return False
            if dotted.role == "down" and tensors.shape(key)[1:2] != shapes[component][module + ".kernel"].shape[-2:-1]:
                return False
        return True

    return next((component for component in COMPONENTS if component in shapes and has_all(component)), "unet")


def _refuse_unsupported(file: Path, keys: Iterable[str]) -> None:
    for key in keys:
        for pattern, kind in _UNSUPPORTED:
            if pattern.search(key):
                raise UserError(f"{file}: {kind} files are not read here (key {key})")


def _refuse_misfits(tensors: TensorFile, slots: Slots, shapes: Shapes) -> None:
    """Compares shapes from the header alone, so that a LoRA of another family is refused before anything is read."""
    misfits = []
    for (component, module), slot in slots.items():
        down, up = tensors.shape(slot.keys["down"]), tensors.shape(slot.keys["up"])
        if not fits(down, up, tuple(shapes[component][module + ".kernel"].shape)):
            misfits.append(f"{slot.keys['down']} {down} with up {up}")
    if misfits:
        hint = _family_hint(tensors, shapes)
        raise UserError(f"{tensors.path}: shapes do not fit this base{hint}: {listing(misfits)}")


def _family_hint(tensors: TensorFile, shapes: Shapes) -> str:
    """The width of the text that the file and the base attend to, where they differ: it tells the families apart."""
    ends = ("attn2_to_k.lora_down.weight", "attn2.to_k.lora_A.weight", "attn2.to_k.lora.down.weight")
    keys = tensors.keys()
    downs = (tensors.shape(key) for key in keys if key.endswith(ends))
    theirs = next((down[1] for down in downs if len(down) > 1), None)
    kernels = (value.shape for path, value in shapes.get("unet", {}).items() if path.endswith("attn2.to_k.kernel"))
    ours = next((kernel[-2] for kernel in kernels), None)
    if theirs is None or ours is None or theirs == ours:
        return ""
    return f" (the LoRA is for a model with cross-attention width {theirs}, this one has {ours})"


def listing(names: list[str]) -> str:
    """The first three names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
