"""Which key of a LoRA file belongs to which module of the base; what fits nothing is refused here, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypersd_jax.errors import UserError
from hypersd_jax.weights import lora_kohya, lora_peft
from hypersd_jax.weights.lora_kinds import Kind, fits_weight, kind_of
from hypersd_jax.weights.tensors import TensorFile

Shapes = Mapping[str, Mapping[str, Any]]
"""``{component: {parameter path: object with .shape}}``."""

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

# What is recognised only to be refused by name.
_UNSUPPORTED = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.set_weight$", "replaced weight (set_weight)"),
        (r"\.(oft_|boft_)", "OFT"),
        (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "GLoRA"),
        (r"\.on_input$", "IA3"),
        (r"\.lora_embedding_[AB]$", "embedding LoRA"),
        (r"\.lora_[AB]\.bias$|\.lora_(down|up)\.bias$|\.lora_bias$", "LoRA with biases"),
        (
            r"^(lora_transformer_|lora_te3_|transformer\.|diffusion_model\.(?!input_|middle_|output_|time_|label_|out\.))",
            "a transformer model's LoRA (FLUX, SD3)",
        ),
    )
)

# The kind that the first word of a role speaks of; alpha, magnitude and bias go with any.
_SORTS = {"down": "LoRA", "up": "LoRA", "mid": "LoRA", "hada": "LoHa", "lokr": "LoKr", "full": "full"}


@dataclass(kw_only=True)
class Slot:
    """The keys that one module of the base takes its tensors from.

    Attributes:
        name: the module as the file spells it, without component.
        layout: "kohya", "kohya-sgm", "ComfyUI", "PEFT" or "diffusers".
        component: as the file names it; None where it does not.
        keys: ``{role of `lora_kinds`: key}``.
    """

    name: str
    layout: str
    component: str | None = None
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def dotted(self) -> bool:
        """Whether the layout is PEFT's or one of diffusers', where a configuration may hold alpha."""
        return self.layout in ("PEFT", "diffusers")

    @property
    def kind(self) -> Kind:
        """What the tensors are; `assign` returns only slots that have one."""
        kind = kind_of(self.keys)
        assert kind is not None
        return kind

    def shapes(self, tensors: TensorFile) -> dict[str, tuple[int, ...]]:
        """``{role: shape}`` from the header; PEFT's magnitudes of convolutions (1, out, 1, 1) are flattened."""
        shapes = {role: tensors.shape(key) for role, key in self.keys.items()}
        if self.dotted and "magnitude" in shapes:
            shapes["magnitude"] = (math.prod(shapes["magnitude"]),)
        return shapes


Slots = dict[tuple[str, str], Slot]


def assign(tensors: TensorFile, shapes: Shapes) -> Slots:
    """The module of the base and the role of every key of the file.

    Raises:
        UserError: a key is of an unsupported kind, matches no module, matches one twice, lacks its partner, or has the
            wrong shape; or the file is no LoRA at all.
    """
    keys = tensors.keys()
    _refuse_unsupported(tensors.path, keys)
    index, norms = lora_kohya.module_index(shapes), lora_kohya.module_index(shapes, "scale")
    bare = _component_of_bare_keys(tensors, shapes)
    slots: Slots = {}
    unknown: list[str] = []
    recognised = 0
    for key in keys:
        kohya, dotted = lora_kohya.parse(key), lora_peft.parse(key)
        target: tuple[str, str] | None = None
        if kohya is not None:
            name, role = kohya
            found = index.get(name) or (norms.get(name) if role in ("full", "bias") else None)
            target = None if found is None else (found.component, found.module)
            slot = Slot(name=name, layout="kohya" if found is None else found.layout)
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
    _refuse_incomplete(tensors.path, slots)
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


def _refuse_incomplete(file: Path, slots: Slots) -> None:
    incomplete = []
    for slot in (slot for slot in slots.values() if kind_of(slot.keys) is None):
        one_of_each = {_SORTS.get(role.partition("_")[0]): key for role, key in slot.keys.items()}
        one_of_each.pop(None, None)
        if len(one_of_each) > 1:
            raise UserError(f"{file}: one module has factors of several kinds: {', '.join(one_of_each.values())}")
        incomplete.append(slot.keys[min(slot.keys, key="alpha".__eq__)])  # the first, but rather a factor than alpha
    if incomplete:
        raise UserError(f"{file}: a factor is missing beside {listing(incomplete)}")


def _refuse_misfits(tensors: TensorFile, slots: Slots, shapes: Shapes) -> None:
    """Compares shapes from the header alone, so that a LoRA of another family is refused before anything is read."""
    misfits = []
    for (component, module), slot in slots.items():
        stored = slot.shapes(tensors)
        kind, weight = slot.kind, weight_shape(shapes, component, module)
        if not fits_weight(kind, stored, weight) or (kind.bias and f"{module}.bias" not in shapes[component]):
            first, *others = ((slot.keys[role], shape) for role, shape in stored.items() if role != "alpha")
            more = ", ".join(f"{key.removeprefix(slot.name).lstrip('.')} {shape}" for key, shape in others)
            misfits.append(f"{first[0]} {first[1]}" + (f" with {more}" if more else ""))
    if misfits:
        hint = _family_hint(tensors, shapes)
        raise UserError(f"{tensors.path}: shapes do not fit this base{hint}: {listing(misfits)}")


def weight_shape(shapes: Shapes, component: str, module: str) -> tuple[int, ...]:
    """The shape of a module's weight in our layout: a kernel's, or a norm's scale's."""
    parameters = shapes[component]
    return tuple(parameters[f"{module}.kernel" if f"{module}.kernel" in parameters else f"{module}.scale"].shape)


def _family_hint(tensors: TensorFile, shapes: Shapes) -> str:
    """The width of the text that the file and the base attend to, where they differ: it tells the families apart."""
    ends = (
        "attn2_to_k.lora_down.weight",
        "attn2_to_k.hada_w1_b",
        "attn2.to_k.lora_A.weight",
        "attn2.to_k.lora.down.weight",
    )
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
