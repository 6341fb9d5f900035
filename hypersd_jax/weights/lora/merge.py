"""Several LoRA files as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_jax.adapters import Adapter, Truncated, concatenate, difference_delta, low_rank, reduced, scaled
from hypersd_jax.errors import UserError
from hypersd_jax.weights.lora import header
from hypersd_jax.weights.lora.convert import (
    Source,
    common_dtype,
    read_alike,
    text_encoders_of,
)
from hypersd_jax.weights.lora.energy import EnergyReport, check_rank
from hypersd_jax.weights.lora.file import LoraFile, write_lora
from hypersd_jax.weights.lora.registry import check_layout


def merge_loras(
    files: Sequence[tuple[Source, float]],
    dst: Source,
    *,
    rank: int | None = None,
    to: str = "kohya",
    base: Source | None = None,
    family: str | None = None,
) -> EnergyReport:
    """Writes the sum of LoRA files, each times its scale, as one file of pairs of factors.

    Without `rank` the sum is exact: the files' factors lie side by side. With it each module's sum is cut to its
    largest singular values, and LoHa, LoKr and full differences may be among the files.

    Args:
        files: ``[(file or folder, scale), ...]``; one alone may be given, to compress or rescale it.
        dst: the file to write. Its header: see `header.merged`; `merged_from` is added.
        rank: of every module, None for the sum of the files' ranks.
        to: a layout that is written (`registry.written_layouts`).
        base: see `convert_lora`.
        family: see `convert_lora`.

    Returns:
        how much of each module's squared norm was kept (1 everywhere without `rank`).

    Raises:
        UserError: nothing to merge, a bad rank, scale, layout or file, files of different bases, or a kind that this
            cannot express: DoRA, which is no fixed change of the weights, changes of biases and norms, and without
            `rank` any but pairs of factors.
    """
    check_layout(to)
    if not files:
        raise UserError("merge: no LoRA files given")
    check_rank(rank)
    for source, scale in files:
        if not np.isfinite(scale):
            raise UserError(f"{source}: its scale must be a finite number, not {scale}")
    loras, shapes = read_alike([source for source, _ in files], base, family)
    scales = [scale for _, scale in files]
    for lora in loras:
        _refuse_what_does_not_merge(lora, rank)
    components = dict.fromkeys(name for lora in loras for name in (*lora.adapters, *lora.differences))
    merged: dict[str, Adapter] = {}
    energy: dict[str, dict[str, tuple[float, float]]] = {}
    for component in components:
        parts = [(lora.adapters.get(component, {}), scale) for lora, scale in zip(loras, scales, strict=True)]
        joined = concatenate([scaled(adapter, scale) for adapter, scale in parts])
        dense = _dense(loras, scales, component)
        cut = {path: _cut(joined.get(path), dense.get(path), rank) for path in dict.fromkeys((*joined, *dense))}
        merged[component] = {path: part.entry for path, part in cut.items()}
        energy[component] = {path: (part.kept, part.total) for path, part in cut.items()}
    write_lora(
        dst,
        merged,
        layout=to,
        metadata={"merged_from": [f"{Path(source).name}@{scale:g}" for source, scale in files]},
        carried=header.merged([lora.metadata for lora in loras]),
        dtype=common_dtype(loras),
        text_encoders=text_encoders_of(shapes),
        shapes=shapes,
    )
    return EnergyReport(file=str(dst), modules=energy)


def _cut(factors: Mapping[str, Any] | None, dense: np.ndarray | None, rank: int | None) -> Truncated:
    """One module's sum of factors and dense differences."""
    if dense is None or rank is None:  # `_refuse_what_does_not_merge` lets no dense one past without a rank
        assert factors is not None
        return reduced(factors, rank)
    if factors is not None:
        dense = dense + (factors["down"] * factors["scale"]) @ factors["up"]
    return low_rank(dense, rank)


def _dense(loras: Sequence[LoraFile], scales: Sequence[float], component: str) -> dict[str, np.ndarray]:
    """The summed differences of one component's modules, as full kernels."""
    total: dict[str, np.ndarray] = {}
    for lora, scale in zip(loras, scales, strict=True):
        for module, entry in lora.differences.get(component, {}).items():
            delta = np.float32(scale) * np.asarray(difference_delta(entry))
            total[module] = total[module] + delta if module in total else delta
    return total


def _refuse_what_does_not_merge(lora: LoraFile, rank: int | None) -> None:
    for differences in lora.differences.values():
        for module, entry in differences.items():
            where = f"{lora.report.file}: {module}"
            if "magnitude" in entry:
                raise UserError(
                    f"{where}: DoRA depends on the base's weights; convert model with it and extract instead"
                )
            if "bias" in entry or np.ndim(entry.get("full", np.zeros((1, 1)))) < 2:
                raise UserError(f"{where}: a change of a bias or norm cannot be written as a LoRA")
            if rank is None:
                raise UserError(f"{where}: LoHa, LoKr and full differences merge only with a rank to cut them to")
