"""LoRA files: any layout in, two out (kohya's, which every program loads, and PEFT's)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypersd_jax.adapters import Adapter
from hypersd_jax.errors import UserError
from hypersd_jax.weights import lora_kohya, lora_peft
from hypersd_jax.weights.lora_factors import from_torch, is_finite
from hypersd_jax.weights.lora_match import COMPONENTS, Shapes, Slot, assign, listing
from hypersd_jax.weights.tensors import TensorFile, open_tensors, save_tensors

LAYOUTS = ("kohya", "peft")

# Header entries about the very factors they came with; a file written anew states its own.
_ABOUT_FACTORS = (lora_peft.HEADER_KEY, "ss_network_module", "ss_network_dim", "ss_network_alpha")


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """What a LoRA file held.

    Attributes:
        file: its path.
        layout: "kohya", "PEFT" or "diffusers"; joined by "+" in a file that mixes them.
        modules: number of adapted modules by component.
        ranks: (smallest, largest).
        alphas: (smallest, largest) as stated; None where the file states none, which means scale 1.
        scales: (smallest, largest) alpha / rank, as applied.
        dtypes: names of the types in which the factors are stored.
        metadata: the header's.
    """

    file: str
    layout: str
    modules: Mapping[str, int]
    ranks: tuple[int, int]
    alphas: tuple[float, float] | None
    scales: tuple[float, float]
    dtypes: tuple[str, ...]
    metadata: Mapping[str, str]

    def __str__(self) -> str:
        counts = " + ".join(f"{count} {component}" for component, count in self.modules.items())
        alpha = "no alpha" if self.alphas is None else f"alpha {_span(self.alphas)}"
        return (
            f"{self.file}: {self.layout} LoRA, {counts} modules, rank {_span(self.ranks)}, {alpha}"
            f" (scale {_span(self.scales)}), {'/'.join(self.dtypes)}"
        )


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file's content: NumPy adapters by component, header metadata, and the report for the user."""

    adapters: Mapping[str, Adapter]
    metadata: Mapping[str, str]
    report: LoraReport


def read_lora(path: str | os.PathLike[str], shapes: Shapes) -> LoraFile:
    """Reads a LoRA file, or a PEFT folder, for a base whose components have these parameter shapes.

    Every tensor of the file is used or the file is refused: a LoRA that matches in part gives wrong images silently.

    Args:
        path: a .safetensors file in any layout of `lora_kohya` and `lora_peft`, or a folder that holds one.
        shapes: ``{component: {parameter path: object with .shape}}`` of the base.

    Returns:
        adapters of float32 NumPy arrays, their `scale` alpha / rank (1 where the file states no alpha).

    Raises:
        UserError: one line naming the file and the first keys that are unreadable, unknown, incomplete, of the wrong
            shape, not finite, or of a kind that is not supported.
    """
    file = weights_file(Path(path))
    with open_tensors(file) as tensors:
        metadata = tensors.metadata
        slots = assign(tensors, shapes)
        dotted = any(slot.layout != "kohya" for slot in slots.values())
        configs = lora_peft.read_configs(file, metadata) if dotted else {}
        adapters: dict[str, Adapter] = {}
        alphas: list[float] = []
        not_finite: list[str] = []
        dtypes: set[str] = set()
        for (component, module), slot in slots.items():
            down, up = tensors.read(slot.keys["down"]), tensors.read(slot.keys["up"])
            not_finite += [slot.keys[role] for role, factor in (("down", down), ("up", up)) if not is_finite(factor)]
            dtypes |= {down.dtype.name, up.dtype.name}
            scale, alpha = _scale(tensors, slot, down.shape[0], configs)
            alphas += [] if alpha is None else [alpha]
            down, up = from_torch(down, up, tuple(shapes[component][module + ".kernel"].shape))
            adapters.setdefault(component, {})[module] = {
                "down": down,
                "up": up,
                "scale": np.full(up.shape[:1], scale, np.float32),
            }
    if not_finite:
        raise UserError(f"{file}: NaN or infinite values in {listing(not_finite)}")
    entries = [entry for adapter in adapters.values() for entry in adapter.values()]
    ranks = [entry["scale"].shape[0] for entry in entries]
    scales = [float(entry["scale"][0]) for entry in entries]
    report = LoraReport(
        file=str(file),
        layout="+".join(sorted({slot.layout for slot in slots.values()})),
        modules={component: len(adapters[component]) for component in COMPONENTS if component in adapters},
        ranks=(min(ranks), max(ranks)),
        alphas=(min(alphas), max(alphas)) if alphas else None,
        scales=(min(scales), max(scales)),
        dtypes=tuple(sorted(dtypes)),
        metadata=metadata,
    )
    return LoraFile(adapters=adapters, metadata=metadata, report=report)


def write_lora(
    path: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    *,
    layout: str = "kohya",
    metadata: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
    text_encoders: int | None = None,
) -> None:
    """Writes a LoRA file whose alpha equals its rank: the adapter's scale is folded into the up factors.

    So a reader that ignores alpha applies the same strength as one that honours it (where ranks differ, see
    `lora_kohya.encode`).

    Args:
        path: where to; replaced atomically.
        adapters: ``{component: adapter}`` with NumPy or JAX leaves.
        layout: "kohya" (diffusers block names) or "peft" (as diffusers saves it).
        metadata: more header entries; what is not a string is written as JSON.
        dtype: of the stored factors: float32, float16 or ml_dtypes.bfloat16.
        text_encoders: how many text encoders the base has (SDXL: 2), where `adapters` does not show it.

    Raises:
        UserError: nothing to write, an unknown layout, or values that are not finite in `dtype`.
    """
    adapters = {component: jax.device_get(adapter) for component, adapter in adapters.items() if adapter}
    if layout not in LAYOUTS:
        raise UserError(f"LoRA layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    if not adapters or not set(adapters) <= set(COMPONENTS):
        raise UserError(f"{path}: nothing to write among the components {', '.join(adapters) or '(none)'}")
    if text_encoders is None:
        text_encoders = 2 if "text_encoder_2" in adapters else 1
    tensors: dict[str, np.ndarray] = {}
    try:
        for component, adapter in adapters.items():
            if layout == "kohya":
                tensors |= lora_kohya.encode(component, adapter, dtype=dtype, text_encoders=text_encoders)
            else:
                tensors |= lora_peft.encode(component, adapter, dtype=dtype)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    given = {name: value for name, value in (metadata or {}).items() if name not in _ABOUT_FACTORS}
    header = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    describe = lora_kohya.describe if layout == "kohya" else lora_peft.describe
    save_tensors(path, tensors, {"format": "pt", **header, **describe(adapters)})


def weights_file(path: Path) -> Path:
    """The one weights file that `path` means: itself, or what a PEFT or diffusers LoRA folder holds."""
    if not path.is_dir():
        return path
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(f"{path}: a LoRA folder must hold one .safetensors file, this one holds {len(found)}")
    return found[0]


def _scale(
    tensors: TensorFile, slot: Slot, rank: int, configs: Mapping[str | None, Mapping[str, Any]]
) -> tuple[float, float | None]:
    """(scale, alpha) of one module: from its alpha tensor, else from PEFT's configuration, else 1 and None."""
    if "alpha" in slot.keys:
        key = slot.keys["alpha"]
        value = tensors.read(key).astype(np.float32)
        if value.size != 1 or not np.isfinite(value).all():
            raise UserError(f"{tensors.path}: {key} is not one finite number")
        return value.item() / rank, value.item()
    config = {} if slot.layout == "kohya" else configs.get(slot.component, {})
    return lora_peft.scale_of(config, slot.name, rank, f"{tensors.path}: {slot.keys['down']}")


def _span(values: tuple[float, float]) -> str:
    low, high = values
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"
