"""A LoRA layout as one record: how its keys are read and written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hypersd_jax.weights.lora.kinds import Kind, kind_of

if TYPE_CHECKING:
    from hypersd_jax.adapters import Adapter
    from hypersd_jax.weights.tensors import TensorFile

Shapes = Mapping[str, Mapping[str, Any]]
"""``{component: {parameter path: object with .shape}}``."""

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, kw_only=True)
class Key:
    """The parsed form of a key by itself.

    Attributes:
        component: as it names it; None where it does not.
        module: the module as the file spells it, without component.
        role: of the tensor to its module, see `kinds`.
        layout: what the report calls the layout that the key is written in.
    """

    component: str | None
    module: str
    role: str
    layout: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """A key and the (component, module path) of the base that it belongs to; None where the base has none such."""

    key: Key
    target: tuple[str, str] | None


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The keys that one module of the base takes its tensors from.

    Attributes:
        first: what the first of the keys says.
        layout: the record that read it.
        keys: ``{role of `kinds`: key}``.
    """

    first: Key
    layout: Layout
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """The kind of the tensors; `match.assign` returns only slots that have one."""
        kind = kind_of(self.keys)
        assert kind is not None
        return kind

    def shapes(self, tensors: TensorFile) -> dict[str, tuple[int, ...]]:
        """``{role: shape}`` from the header; see `Layout.flat_magnitude`."""
        shapes = {role: tensors.shape(key) for role, key in self.keys.items()}
        if self.layout.flat_magnitude and "magnitude" in shapes:
            shapes["magnitude"] = (math.prod(shapes["magnitude"]),)
        return shapes


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The base that a LoRA is written for.

    Attributes:
        dtype: of the stored factors.
        text_encoders: how many the base has.
        shapes: of the base; None where they are not known.
    """

    dtype: Any
    text_encoders: int
    shapes: Shapes | None


Match = Callable[[str], Found | None]
"""The parsed form of a key; None where the key is not of the layout."""

Strength = Callable[[Slot, int, str], tuple[float, float | None]]
"""(scale, alpha or None) of a module without an alpha tensor, from (slot, rank, place for errors)."""


def _nothing(_: Any) -> dict[str, str]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One LoRA layout. Nothing outside its record and the functions that it names knows it by name.

    A layout that is only read has no `encode`, one that is only written no `matcher`.

    Attributes:
        name: what `write_lora` and the command line call it.
        matcher: (file, shapes of the base) -> the function that matches the file's keys; called once a file.
        spelled: reads a key without a base, where it gives the module path as diffusers has it, else None.
        strengths: (path of the file, its header) -> how strongly its modules apply where no alpha tensor says so; None
            for layouts that state alpha in tensors alone.
        flat_magnitude: whether DoRA's magnitude has one number for each output whatever its shape.
        encode: names and tensors of one component's adapter, the scale folded in.
        describe: header entries about adapters as written; they override the caller's.
        about_base: header entries about a base of these shapes; the caller's override them.
        about_factors: header keys that describe the factors they came with, so that no other file may carry them on.
    """

    name: str
    matcher: Callable[[TensorFile, Shapes], Match] | None = None
    spelled: Callable[[str], Key | None] | None = None
    strengths: Callable[[Path, Mapping[str, str]], Strength] | None = None
    flat_magnitude: bool = False
    encode: Callable[[str, Adapter, Destination], Iterable[tuple[str, np.ndarray]]] | None = None
    describe: Callable[[Mapping[str, Adapter]], dict[str, str]] = _nothing
    about_base: Callable[[Shapes], dict[str, str]] = _nothing
    about_factors: tuple[str, ...] = ()
