"""Matching the keys of a LoRA file with the base's modules; what fits nothing is refused here, by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hypersd_jax.errors import UserError
from hypersd_jax.weights.lora.kinds import fits_weight, kind_of
from hypersd_jax.weights.lora.layout import Found, Key, Layout, Shapes, Slot
from hypersd_jax.weights.lora.registry import LAYOUTS
from hypersd_jax.weights.lora.unsupported import unsupported
from hypersd_jax.weights.tensors import TensorFile

LEFT_OUT = ("bundle_emb.",)
"""Keys of what is bundled with some LoRAs and not used here: embeddings (textual inversion)."""

# The kind that the first word of a role speaks of; alpha, magnitude and bias go with any.
_SORTS = {"down": "LoRA", "up": "LoRA", "mid": "LoRA", "hada": "LoHa", "lokr": "LoKr", "full": "full"}

Slots = dict[tuple[str, str], Slot]
Matches = dict[str, tuple[Layout, Found]]
"""The parsed form of every key that is written in some layout, and the layout."""


def assign(tensors: TensorFile, shapes: Shapes) -> tuple[Slots, list[str]]:
    """The module of the base and the role of every key of the file, and the keys that are left out (`LEFT_OUT`).

    Raises:
        UserError: a key is of an unsupported kind, matches no module, matches one twice, lacks its partner, or has the
            wrong shape; or the file is no LoRA at all.
    """
    left_out = [key for key in tensors.keys() if key.startswith(LEFT_OUT)]  # noqa: SIM118
    keys = [key for key in tensors.keys() if not key.startswith(LEFT_OUT)]  # noqa: SIM118
    matches = read_keys(tensors, shapes, keys)
    for key in keys:
        if key not in matches and (kind := unsupported(key)):
            raise UserError(f"{tensors.path}: {kind} files are not read here (key {key})")
    slots: Slots = {}
    unknown: list[str] = []
    for key, (layout, found) in matches.items():
        if found.target is None:
            unknown.append(key)
            continue
        slot = slots.setdefault(found.target, Slot(first=found.key, layout=layout))
        role = found.key.role
        if role in slot.keys:
            raise UserError(f"{tensors.path}: {slot.keys[role]} and {key} are both for {'.'.join(found.target)}")
        slot.keys[role] = key
    if not slots and not unknown:
        raise UserError(f"{tensors.path}: is not a LoRA file: {listing(keys or left_out) or 'it holds no tensors'}")
    if unknown:
        hint = _family_hint(tensors, shapes, matches)
        raise UserError(f"{tensors.path}: no such module in this base{hint}: {listing(unknown)}")
    if unread := sorted((key for key in keys if key not in matches), key=_is_alpha):
        raise UserError(f"{tensors.path}: no such module or tensor is known in any layout: {listing(unread)}")
    _refuse_incomplete(tensors.path, slots)
    _refuse_misfits(tensors, slots, shapes, matches)
    return slots, left_out


def read_keys(tensors: TensorFile, shapes: Shapes, keys: Iterable[str]) -> Matches:
    """Read each key by the first layout that finds its module, else by the first that it is written in."""
    matchers = [(layout, layout.matcher(tensors, shapes)) for layout in LAYOUTS.values() if layout.matcher is not None]
    matches: Matches = {}
    # Alpha is spelled alike in several layouts, so that its partners say which one it is.
    for key in sorted(keys, key=_is_alpha):
        readings = [(layout, found) for layout, match in matchers if (found := match(key)) is not None]
        if readings:
            matches[key] = next((reading for reading in readings if reading[1].target is not None), readings[0])
    return matches


def _is_alpha(key: str) -> bool:
    return key.endswith(".alpha")


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


def _refuse_misfits(tensors: TensorFile, slots: Slots, shapes: Shapes, matches: Matches) -> None:
    """Compares shapes from the header alone, so that a LoRA of another family is refused before anything is read."""
    misfits = [text for target, slot in slots.items() if (text := misfit(tensors, slot, shapes, target)) is not None]
    if misfits:
        hint = _family_hint(tensors, shapes, matches)
        raise UserError(f"{tensors.path}: shapes do not fit this base{hint}: {listing(misfits)}")


def misfit(tensors: TensorFile, slot: Slot, shapes: Shapes, target: tuple[str, str]) -> str | None:
    """The keys and shapes of a module that do not fit the base's of that path; None where they do."""
    component, module = target
    stored, kind = slot.shapes(tensors), slot.kind
    fitting = fits_weight(kind, stored, weight_shape(shapes, component, module))
    if fitting and not (kind.bias and f"{module}.bias" not in shapes[component]):
        return None
    first, *others = ((slot.keys[role], shape) for role, shape in stored.items() if role != "alpha")
    more = ", ".join(f"{key.removeprefix(slot.first.module).lstrip('.')} {shape}" for key, shape in others)
    return f"{first[0]} {first[1]}" + (f" with {more}" if more else "")


def weight_shape(shapes: Shapes, component: str, module: str) -> tuple[int, ...]:
    """The shape of a module's weight in our layout: a kernel's, or a norm's scale's."""
    parameters = shapes[component]
    return tuple(parameters[f"{module}.kernel" if f"{module}.kernel" in parameters else f"{module}.scale"].shape)


def _family_hint(tensors: TensorFile, shapes: Shapes, matches: Matches) -> str:
    """The width of the text that the file and the base attend to, where they differ: it tells the families apart."""
    attended = (_attended(found.key, tensors.shape(key)) for key, (_, found) in matches.items())
    theirs = next(filter(None, attended), None)
    kernels = (value.shape for path, value in shapes.get("unet", {}).items() if path.endswith("attn2.to_k.kernel"))
    ours = next((kernel[-2] for kernel in kernels), None)
    if theirs is None or ours is None or theirs == ours:
        return ""
    return f" (the LoRA is for a model with cross-attention width {theirs}, this one has {ours})"


def _attended(key: Key, shape: tuple[int, ...]) -> int | None:
    """The number of inputs of the key's module, if it is one that attends to the text and the key tells."""
    if key.module.endswith(("attn2_to_k", "attn2.to_k")) and key.role in ("down", "hada_w1_b") and len(shape) > 1:
        return shape[1]
    return None


def listing(names: list[str]) -> str:
    """The first three names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
