"""Which key of a LoRA file belongs to which module of the base; what fits nothing is refused here, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypersd_jax.errors import UserError
from hypersd_jax.weights.lora import kohya, peft
from hypersd_jax.weights.lora.kinds import Kind, fits_weight, kind_of
from hypersd_jax.weights.tensors import TensorFile

Shapes = Mapping[str, Mapping[str, Any]]
"""``{component: {parameter path: object with .shape}}``."""

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

LEFT_OUT = ("bundle_emb.",)
"""Keys of what may come beside a LoRA and is not used here: embeddings (textual inversion) bundled with it."""

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
            r"^(lora_transformer[._]|lora_te3[._]|transformer\.|t5[a-z]*\."
            r"|diffusion_model\.(?!input_|middle_|output_|time_|label_|out\.)"
            r"|lora_unet_(double|single|joint)_(transformer_)?blocks_|lora_unet_(transformer_blocks|blocks|layers)_)",
            "a transformer model's LoRA (FLUX, SD3)",
        ),
        (r"^lora_prior", "Stable Cascade LoRA"),
        (r"^(unet|text_encoder):\d+:(up|down)$", "numbered LoRA (the first trainers' layout)"),
    )
)

# The kind that the first word of a role speaks of; alpha, magnitude and bias go with any.
_SORTS = {"down": "LoRA", "up": "LoRA", "mid": "LoRA", "hada": "LoHa", "lokr": "LoKr", "full": "full"}


@dataclass(kw_only=True)
class Slot:
    """The keys that one module of the base takes its tensors from.

    Attributes:
        name: the module as the file spells it, without component.
        layout: "kohya", "kohya-sgm", "ComfyUI", "OneTrainer", "PEFT" or "diffusers".
        component: as the file names it; None where it does not.
        keys: ``{role of `kinds`: key}``.
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


def assign(tensors: TensorFile, shapes: Shapes) -> tuple[Slots, list[str]]:
    """The module of the base and the role of every key of the file, and the keys that are left out (`LEFT_OUT`).

    Raises:
        UserError: a key is of an unsupported kind, matches no module, matches one twice, lacks its partner, or has the
            wrong shape; or the file is no LoRA at all.
    """
    left_out = [key for key in tensors.keys() if key.startswith(LEFT_OUT)]  # noqa: SIM118
    keys = [key for key in tensors.keys() if not key.startswith(LEFT_OUT)]  # noqa: SIM118
    _refuse_unsupported(tensors.path, keys)
    index, norms = kohya.module_index(shapes), kohya.module_index(shapes, "scale")
    bare = _component_of_bare_keys(tensors, shapes)
    slots: Slots = {}
    unknown: list[str] = []
    unread: list[str] = []
    # Alpha is spelled alike in several layouts, so that its partners say which one it is.
    for key in sorted(keys, key=lambda key: key.endswith(".alpha")):
        found = _kohya_slot(key, index, norms) or _dotted_slot(key, shapes, bare, index)
        if found is None:
            unread.append(key)
            continue
        target, role, slot = found
        if target is None:
            unknown.append(key)
            continue
        slot = slots.setdefault(target, slot)
        if role in slot.keys:
            raise UserError(f"{tensors.path}: {slot.keys[role]} and {key} are both for {'.'.join(target)}")
        slot.keys[role] = key
    if not slots and not unknown:
        raise UserError(f"{tensors.path}: is not a LoRA file: {listing(keys or left_out) or 'it holds no tensors'}")
    if unknown:
        hint = _family_hint(tensors, shapes)
        raise UserError(f"{tensors.path}: no such module in this base{hint}: {listing(unknown)}")
    if unread:
        raise UserError(f"{tensors.path}: no such module or tensor is known in any layout: {listing(unread)}")
    _refuse_incomplete(tensors.path, slots)
    _refuse_misfits(tensors, slots, shapes)
    return slots, left_out


Index = Mapping[str, kohya.Target]
Found = tuple[tuple[str, str] | None, str, Slot]
"""The module that a key belongs to, None where the base has none such; its role; and the slot that it would begin."""


def _kohya_slot(key: str, index: Index, norms: Index) -> Found | None:
    """A key with kohya's factors, under any program's names; None for other keys."""
    parsed = kohya.parse(key)
    if parsed is None:
        return None
    name, role = parsed
    target = kohya.find(index, name)
    if target is None and role in ("full", "bias"):
        target = kohya.find(norms, name)
    if target is None and peft.parse(key) is not None:  # PEFT's alpha, of a module without a name in the index
        return None
    slot = Slot(name=name, layout=kohya.layout_of(name, target))
    return None if target is None else (target.component, target.module), role, slot


def _dotted_slot(key: str, shapes: Shapes, bare: str, index: Index) -> Found | None:
    """A key with PEFT's or diffusers' factors; None for other keys.

    Args:
        key: of the file.
        shapes: of the base.
        bare: the component of keys that name none.
        index: of names that are not diffusers' paths.
    """
    dotted = peft.parse(key)
    if dotted is None:
        return None
    component = dotted.component or bare
    module = peft.locate(component, dotted.module, shapes.get(component, {}))
    slot = Slot(name=dotted.module, layout=dotted.layout, component=dotted.component)
    if module is not None:
        return (component, module), dotted.role, slot
    target = kohya.find(index, f"{component}.{dotted.module}") or kohya.find(index, dotted.module)
    return None if target is None else (target.component, target.module), dotted.role, slot


def _component_of_bare_keys(tensors: TensorFile, shapes: Shapes) -> str:
    """Which component the keys without one belong to: the first that has all their modules with the right widths."""
    keys = tensors.keys()
    parsed = [(key, dotted) for key in keys if (dotted := peft.parse(key)) and not dotted.component]

    def has_all(component: str) -> bool:
        for key, dotted in parsed:
            module = peft.locate(component, dotted.module, shapes[component])
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
    theirs = next(filter(None, (_attended(tensors, key) for key in tensors.keys())), None)  # noqa: SIM118
    kernels = (value.shape for path, value in shapes.get("unet", {}).items() if path.endswith("attn2.to_k.kernel"))
    ours = next((kernel[-2] for kernel in kernels), None)
    if theirs is None or ours is None or theirs == ours:
        return ""
    return f" (the LoRA is for a model with cross-attention width {theirs}, this one has {ours})"


def _attended(tensors: TensorFile, key: str) -> int | None:
    """How many inputs the key's module has, if it is one that attends to the text and the key tells."""
    underscored, dotted = kohya.parse(key), peft.parse(key)
    name, role = underscored or ((dotted.module, dotted.role) if dotted else ("", ""))
    shape = tensors.shape(key)
    if name.endswith(("attn2_to_k", "attn2.to_k")) and role in ("down", "hada_w1_b") and len(shape) > 1:
        return shape[1]
    return None


def listing(names: list[str]) -> str:
    """The first three names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
