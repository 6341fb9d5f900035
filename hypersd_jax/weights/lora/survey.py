"""What a LoRA file holds, told and not judged: its modules, and every key that fits no base, with the reason.

`match.assign` refuses such a file; `hypersd inspect` describes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypersd_jax.weights.lora import kohya, peft
from hypersd_jax.weights.lora.kinds import kind_of
from hypersd_jax.weights.lora.layout import COMPONENTS, Key, Layout, Shapes, Slot
from hypersd_jax.weights.lora.match import LEFT_OUT, misfit, read_keys
from hypersd_jax.weights.lora.registry import LAYOUTS
from hypersd_jax.weights.lora.unsupported import unsupported
from hypersd_jax.weights.tensors import TensorFile

Slots = dict[tuple[str, str], Slot]

NO_MODULE = "no such module in the base"
OTHER_SHAPE = "another shape than the base's"
INCOMPLETE = "a factor is missing"
TWICE = "a second tensor for the same factor"
UNKNOWN = "in no known layout"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A LoRA file held against a base.

    Attributes:
        slots: the keys of each module that fits, by (component, module path).
        not_matching: the other keys by the reason why they do not fit, as `NO_MODULE`.
        left_out: keys of what came with the LoRA (`match.LEFT_OUT`).
    """

    slots: Slots
    not_matching: Mapping[str, list[str]]
    left_out: list[str]

    @property
    def matched(self) -> int:
        """How many keys fit."""
        return sum(len(slot.keys) for slot in self.slots.values())

    @property
    def unmatched(self) -> int:
        """How many keys do not."""
        return sum(map(len, self.not_matching.values()))


def looks_like_lora(tensors: TensorFile) -> bool:
    """Tell whether any key of the file is a LoRA's, of whatever kind and layout."""
    return any(_read_alone(key) is not None or unsupported(key) or key.startswith(LEFT_OUT) for key in tensors.keys())  # noqa: SIM118


def survey(tensors: TensorFile, shapes: Shapes) -> Survey:
    """Hold a file against a base whose components have these parameter shapes; only headers are read."""
    left_out, keys = _sorted_out(tensors)
    slots: Slots = {}
    reasons: dict[str, list[str]] = {}
    matches = read_keys(tensors, shapes, keys)
    for key in keys:
        if key not in matches:
            kind = unsupported(key)
            reasons.setdefault(UNKNOWN if kind is None else f"{kind}, which is not read here", []).append(key)
    for key, (layout, found) in matches.items():
        if found.target is None:
            reasons.setdefault(NO_MODULE, []).append(key)
        else:
            _place(slots, found.target, found.key, layout, key, reasons)
    for target, slot in list(slots.items()):
        if kind_of(slot.keys) is None:
            reasons.setdefault(INCOMPLETE, []).extend(slots.pop(target).keys.values())
        elif misfit(tensors, slot, shapes, target) is not None:
            reasons.setdefault(OTHER_SHAPE, []).extend(slots.pop(target).keys.values())
    return Survey(slots=slots, not_matching=reasons, left_out=left_out)


def survey_alone(tensors: TensorFile) -> Survey:
    """Describe a file without a base: its modules are called as the file spells them."""
    left_out, keys = _sorted_out(tensors)
    slots: Slots = {}
    reasons: dict[str, list[str]] = {}
    for key in keys:
        alone = _read_alone(key)
        if alone is None:
            kind = unsupported(key)
            reasons.setdefault(UNKNOWN if kind is None else f"{kind}, which is not read here", []).append(key)
            continue
        layout, read = alone
        _place(slots, (read.component or "unet", read.module), read, layout, key, reasons)
    for target, slot in list(slots.items()):
        if kind_of(slot.keys) is None:
            reasons.setdefault(INCOMPLETE, []).extend(slots.pop(target).keys.values())
    return Survey(slots=slots, not_matching=reasons, left_out=left_out)


def _sorted_out(tensors: TensorFile) -> tuple[list[str], list[str]]:
    """The keys that are left out, and the others, alphas last: their partners say which layout they are of."""
    keys = sorted(tensors.keys(), key=lambda key: key.endswith(".alpha"))
    return [key for key in keys if key.startswith(LEFT_OUT)], [key for key in keys if not key.startswith(LEFT_OUT)]


def _place(
    slots: Slots, target: tuple[str, str], key: Key, layout: Layout, text: str, reasons: dict[str, list[str]]
) -> None:
    slot = slots.setdefault(target, Slot(first=key, layout=layout))
    if key.role in slot.keys:
        reasons.setdefault(TWICE, []).append(text)
    else:
        slot.keys[key.role] = text


def _read_alone(key: str) -> tuple[Layout, Key] | None:
    """A key read without a base, in the first layout that it is written in."""
    if unsupported(key):
        return None
    if (parsed := kohya.parse(key)) is not None:
        name, role = parsed
        component, module = _component(name)
        target = kohya.Target(component, module, any(mark in name for mark in ("put_block", "middle_block")))
        read = Key(component=component, module=name, role=role, layout=kohya.layout_of(name, target))
        return LAYOUTS["kohya"], read
    if (read_key := peft.parse(key)) is not None:
        return LAYOUTS["peft"], read_key
    return None


def _component(name: str) -> tuple[str, str]:
    """The component that a module's name begins with, by the longest of the prefixes that programs use."""
    prefixes = sorted(
        ((prefix, component) for component in COMPONENTS for prefix in kohya.PREFIXES[component]),
        key=lambda pair: -len(pair[0]),
    )
    for prefix, component in prefixes:
        for mark in "_.":
            if name.startswith(prefix + mark):
                return component, name.removeprefix(prefix + mark)
    return "unet", name
