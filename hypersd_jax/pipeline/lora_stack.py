"""Several LoRAs on one model: named, scaled, and joined into one adapter a component."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from hypersd_jax.adapters import Adapter, Differences, altered, concatenate, pad, scaled
from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError
from hypersd_jax.weights.lora import LoraReport, read_lora
from hypersd_jax.weights.placement import place

Params = Mapping[str, Mapping[str, jax.Array]]
"""``{component: {parameter path: array}}``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedLora:
    """A loaded LoRA: adapters and differences by component, at the file's own strength, and the user's scale.

    ``origin`` is its file; None of one that was given in memory.
    """

    adapters: Mapping[str, Adapter]
    differences: Mapping[str, Differences]
    scale: float
    metadata: Mapping[str, str]
    origin: str | None


class LoraStack:
    """The LoRAs of one pipeline, in loading order.

    `adapters` joins them exactly, by concatenation along the rank, for the forward pass. What LoHa, LoKr, DoRA and full
    differences change of the weights is `altered`, all of it counted from the base (see `adapters.differences`), so the
    order of loading does not matter.
    """

    def __init__(self, shapes: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]], mesh: Mesh | None = None) -> None:
        self._shapes = shapes
        self._mesh = mesh
        self._loras: dict[str, LoadedLora] = {}
        self._joined: dict[str, Adapter] | None = None
        self._altered: tuple[Params, Params] | None = None

    def load(self, path: Path, scale: float, name: str | None) -> LoraReport:
        """Read a file and add it under ``name`` (default: the file's stem, numbered where another file has it)."""
        file = read_lora(path, self._shapes)
        name = name or self._free_name(path)
        self.add(name, file.adapters, scale, file.metadata, origin=str(path), differences=file.differences)
        return file.report

    def add(
        self,
        name: str,
        adapters: Mapping[str, Adapter],
        scale: float,
        metadata: Mapping[str, str] | None = None,
        origin: str | None = None,
        differences: Mapping[str, Differences] | None = None,
    ) -> None:
        """Add adapters under ``name``; a LoRA of that name is replaced, and is then the last."""
        _check_scale(name, scale)
        self._loras.pop(name, None)
        self._loras[name] = LoadedLora(
            adapters=adapters,
            differences=differences or {},
            scale=scale,
            metadata=metadata or {},
            origin=origin,
        )
        self._changed()

    def set_scale(self, name: str, scale: float) -> None:
        """Change the user's scale of one LoRA."""
        _check_scale(name, scale)
        self._loras[name] = dataclasses.replace(self._named(name), scale=scale)
        self._changed()

    def remove(self, name: str | None) -> None:
        """Remove one LoRA, or all when ``name`` is None."""
        if name is None:
            self._loras.clear()
        else:
            self._named(name)
            del self._loras[name]
        self._changed()

    def loaded(self) -> dict[str, LoadedLora]:
        """The LoRAs by name, in loading order."""
        return dict(self._loras)

    def adapters(self) -> dict[str, Adapter]:
        """Join the LoRAs to one adapter a component, its ranks padded to a common bucket; {} without LoRAs."""
        if self._joined is None:
            components = dict.fromkeys(name for lora in self._loras.values() for name in lora.adapters)
            self._joined = {component: self._on_devices(self._join(component)) for component in components}
        return self._joined

    def altered(self, params: Params) -> Params:
        """Write all differences into the base's parameters; `params` itself where no LoRA has any.

        The base is left as it was, so that another scale starts from it and unloading gives it back bit for bit; the
        changed weights are held beside it until the LoRAs change. Leaves that nothing changes are shared.

        Args:
            params: ``{component: parameters}`` of the base.
        """
        if not any(lora.differences for lora in self._loras.values()):
            return params
        if self._altered is None or self._altered[0] is not params:
            result = dict(params)
            for component in {name for lora in self._loras.values() for name in lora.differences}:
                loras = [lora for lora in self._loras.values() if component in lora.differences]
                stack = [(lora.differences[component], lora.scale) for lora in loras]
                result[component] = {**params[component], **altered(params[component], stack)}
            self._altered = params, result
        return self._altered[1]

    def _changed(self) -> None:
        self._joined = None
        self._altered = None

    def _join(self, component: str) -> Adapter:
        loras = [lora for lora in self._loras.values() if component in lora.adapters]
        return pad(concatenate([scaled(lora.adapters[component], lora.scale) for lora in loras]))

    def _on_devices(self, adapter: Adapter) -> Adapter:
        """Put an adapter on the devices once, not at every call."""
        if self._mesh is None:
            return jax.device_put(adapter)
        return place(self._mesh, adapter)

    def _free_name(self, path: Path) -> str:
        """The stem; "stem-2", "stem-3", ... for files of one name in several folders."""
        names = itertools.chain([path.stem], (f"{path.stem}-{number}" for number in itertools.count(2)))
        return next(name for name in names if name not in self._loras or self._loras[name].origin == str(path))

    def _named(self, name: str) -> LoadedLora:
        if name not in self._loras:
            raise UserError(f"no LoRA named {name!r} is loaded{nearest(name, self._loras)}")
        return self._loras[name]


def _check_scale(name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise UserError(f"the scale of LoRA {name!r} must be a finite number, not {scale}")
