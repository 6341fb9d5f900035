"""LoRA files: any layout in, three out (kohya's under two namings, which every program loads, and PEFT's)."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypersd_jax.adapters import Adapter, Differences
from hypersd_jax.errors import UserError
from hypersd_jax.weights.lora import header
from hypersd_jax.weights.lora.factors import is_finite
from hypersd_jax.weights.lora.kinds import decode, rank_of
from hypersd_jax.weights.lora.layout import COMPONENTS, Destination, Shapes, Slot, Strength
from hypersd_jax.weights.lora.match import assign, listing, weight_shape
from hypersd_jax.weights.lora.registry import LAYOUTS, check_layout
from hypersd_jax.weights.tensors import TensorFile, open_tensors, save_tensors


@dataclass(frozen=True, kw_only=True, repr=False)
class LoraReport:
    """The contents of a LoRA file.

    Attributes:
        file: its path.
        layout: "kohya", "kohya-sgm", "ComfyUI", "OneTrainer", "PEFT" or "diffusers"; joined by "+" in a file that mixes
            them.
        kinds: number of modules by kind: "LoRA", "LoHa", "LoKr", "full", each also "with DoRA".
        modules: number of adapted modules by component.
        ranks: (smallest, largest); None where no module has a rank.
        alphas: (smallest, largest) as stated; None where the file states none, which means scale 1.
        scales: (smallest, largest) alpha / rank, as applied.
        dtypes: names of the types in which the factors are stored.
        metadata: the header's.
        left_out: keys of what came with the LoRA and is not used: embeddings (textual inversion).
    """

    file: str
    layout: str
    kinds: Mapping[str, int]
    modules: Mapping[str, int]
    ranks: tuple[int, int] | None
    alphas: tuple[float, float] | None
    scales: tuple[float, float]
    dtypes: tuple[str, ...]
    metadata: Mapping[str, str]
    left_out: tuple[str, ...] = ()

    @property
    def about_left_out(self) -> str:
        """The counts and names of what is not used; "" for most files."""
        if not self.left_out:
            return ""
        what = "embedding" if len(self.left_out) == 1 else "embeddings"
        return f"left out, {len(self.left_out)} {what} that came with it: {listing(list(self.left_out))}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def __str__(self) -> str:
        counts = " + ".join(f"{count} {component}" for component, count in self.modules.items())
        rank = "no rank" if self.ranks is None else f"rank {_span(self.ranks)}"
        alpha = "no alpha" if self.alphas is None else f"alpha {_span(self.alphas)}"
        return (
            f"{self.file}: {self.layout} {'+'.join(self.kinds)}, {counts} modules, {rank}, {alpha}"
            f" (scale {_span(self.scales)}), {'/'.join(self.dtypes)}"
        ) + (f"; {self.about_left_out}" if self.left_out else "")


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file's content, as NumPy arrays.

    Attributes:
        adapters: by component, pairs of factors, which the forward pass applies.
        differences: by component, what is written into the weights instead (LoHa, LoKr, DoRA, full differences);
            {} for most files.
        metadata: the header's.
        report: for the user.
    """

    adapters: Mapping[str, Adapter]
    differences: Mapping[str, Differences]
    metadata: Mapping[str, str]
    report: LoraReport


def read_lora(path: str | os.PathLike[str], shapes: Shapes) -> LoraFile:
    """Reads a LoRA file, or a PEFT folder, for a base whose components have these parameter shapes.

    Every tensor of the file is used or the file is refused: a LoRA that matches in part gives wrong images silently.

    Args:
        path: a .safetensors file in any of `registry.LAYOUTS`, or a folder that holds one.
        shapes: ``{component: {parameter path: object with .shape}}`` of the base.

    Returns:
        adapters and differences of float32 NumPy arrays, their `scale` alpha / rank (1 where the file states no alpha).

    Raises:
        UserError: one line naming the file and the first keys that are unreadable, unknown, incomplete, of the wrong
            shape, not finite, or of a kind that is not supported.
    """
    file = weights_file(Path(path))
    with open_tensors(file) as tensors:
        metadata = tensors.metadata
        slots, left_out = assign(tensors, shapes)
        layouts = {slot.layout.name: slot.layout for slot in slots.values()}
        strengths = {name: each.strengths(file, metadata) for name, each in layouts.items() if each.strengths}
        adapters: dict[str, Adapter] = {}
        differences: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        ranks: list[int] = []
        scales: list[float] = []
        alphas: list[float] = []
        not_finite: list[str] = []
        dtypes: set[str] = set()
        for (component, module), slot in slots.items():
            values = {role: tensors.read(key) for role, key in slot.keys.items() if role != "alpha"}
            not_finite += [slot.keys[role] for role, value in values.items() if not is_finite(value)]
            dtypes |= {value.dtype.name for value in values.values()}
            rank = rank_of(slot.shapes(tensors))
            scale, alpha = strength_of(tensors, slot, rank, strengths.get(slot.layout.name))
            ranks += [] if rank is None else [rank]
            scales.append(scale)
            alphas += [] if alpha is None else [alpha]
            if slot.layout.flat_magnitude and "magnitude" in values:
                values["magnitude"] = values["magnitude"].reshape(-1)
            entry = decode(slot.kind, values, weight_shape(shapes, component, module))
            if slot.kind.is_adapter:
                vector = np.full(entry["up"].shape[:1], scale, np.float32)
                factors: dict[str, Any] = {"down": entry.pop("down"), "up": entry.pop("up"), "scale": vector}
                adapters.setdefault(component, {})[module] = factors
            if entry:
                strength = np.float32(1.0 if slot.kind.is_adapter else scale)
                differences.setdefault(component, {})[module] = {**entry, "scale": np.asarray(strength)}
    if not_finite:
        raise UserError(f"{file}: NaN or infinite values in {listing(not_finite)}")
    counts = Counter(component for component, _ in slots)
    report = LoraReport(
        file=str(file),
        layout="+".join(sorted(_layouts(slots))),
        kinds=dict(sorted(Counter(str(slot.kind) for slot in slots.values()).items())),
        modules={component: counts[component] for component in COMPONENTS if component in counts},
        ranks=(min(ranks), max(ranks)) if ranks else None,
        alphas=(min(alphas), max(alphas)) if alphas else None,
        scales=(min(scales), max(scales)),
        dtypes=tuple(sorted(dtypes)),
        metadata=metadata,
        left_out=tuple(left_out),
    )
    if left_out:
        warnings.warn(f"{file}: {report.about_left_out}", stacklevel=2)
    return LoraFile(adapters=adapters, differences=differences, metadata=metadata, report=report)


def write_lora(
    path: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    *,
    layout: str = "kohya",
    metadata: Mapping[str, Any] | None = None,
    carried: Mapping[str, str] | None = None,
    dtype: Any = np.float32,
    text_encoders: int | None = None,
    shapes: Shapes | None = None,
) -> None:
    """Writes a LoRA file whose alpha equals its rank: the adapter's scale is folded into the up factors.

    So a reader that ignores alpha applies the same strength as one that honours it (where ranks differ, see
    `kohya.encode`).

    Args:
        path: where to; replaced atomically.
        adapters: ``{component: adapter}`` with NumPy or JAX leaves.
        layout: one of `registry.written_layouts`: "kohya" (diffusers block names), "kohya-sgm" (SDXL under sgm's names,
            as kohya's trainers write it), "peft" (as diffusers saves it).
        metadata: more header entries; what is not a string is written as JSON. Among them may be sampling settings
            (`header.SETTINGS`), which are then marked as ours.
        carried: the header of the file that this one is made from, of this package or any other.
        dtype: of the stored factors: float32, float16 or ml_dtypes.bfloat16.
        text_encoders: how many text encoders the base has (SDXL: 2), where `adapters` does not show it.
        shapes: of the base, from which kohya's header says what family it is; "kohya-sgm" needs them for its names.

    Raises:
        UserError: nothing to write, an unknown layout, "kohya-sgm" for a base that is not SDXL, or values that are not
            finite in `dtype`.
    """
    adapters = {component: jax.device_get(adapter) for component, adapter in adapters.items() if adapter}
    check_layout(layout)
    if not adapters or not set(adapters) <= set(COMPONENTS):
        raise UserError(f"{path}: nothing to write among the components {', '.join(adapters) or '(none)'}")
    if text_encoders is None:
        text_encoders = 2 if "text_encoder_2" in adapters else 1
    record, to = LAYOUTS[layout], Destination(dtype=dtype, text_encoders=text_encoders, shapes=shapes)
    assert record.encode is not None  # as `check_layout` has seen
    tensors: dict[str, np.ndarray] = {}
    try:
        for component, adapter in adapters.items():
            tensors |= record.encode(component, adapter, to)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    entries = {**header.carried(carried or {}), **header.marked(metadata or {})}
    # A file that is written anew states its own factors.
    about_factors = {name for each in LAYOUTS.values() for name in each.about_factors}
    given = {name: value for name, value in entries.items() if name not in about_factors}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    if shapes is not None:
        texts = {**record.about_base(shapes), **texts}
    save_tensors(path, tensors, {"format": "pt", **texts, **record.describe(adapters)})


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


def strength_of(
    tensors: TensorFile, slot: Slot, rank: int | None, strength: Strength | None
) -> tuple[float, float | None]:
    """(scale, alpha) of one module: from its alpha tensor, else as its layout states it, else 1 and None.

    Args:
        tensors: the file.
        slot: the module's keys.
        rank: its rank; None where it has none.
        strength: the layout's, see `Layout.strengths`.
    """
    if "alpha" in slot.keys:
        key = slot.keys["alpha"]
        value = tensors.read(key)
        if value.size != 1 or not is_finite(value):
            raise UserError(f"{tensors.path}: {key} is not one finite number")
        alpha = float(value.item())
        return (1.0, None) if rank is None else (alpha / rank, alpha)
    if strength is None or rank is None:
        return 1.0, None
    return strength(slot, rank, f"{tensors.path}: {next(iter(slot.keys.values()))}")


def _layouts(slots: Mapping[tuple[str, str], Slot]) -> set[str]:
    """The layout of the UNet's keys, where there are any: the text encoders' are alike in both of kohya's layouts."""
    unet = {slot.first.layout for (component, _), slot in slots.items() if component == "unet"}
    return unet or {slot.first.layout for slot in slots.values()}


def _span(values: tuple[float, float]) -> str:
    low, high = values
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"
