"""The LoRA that comes closest to turning one model into another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hypersd_jax.adapters import TARGETS_14, Adapter, low_rank, target_paths
from hypersd_jax.errors import UserError
from hypersd_jax.weights.assembly import HostParams, networks, parse
from hypersd_jax.weights.components import open_model
from hypersd_jax.weights.keys import torch_key, torch_shape
from hypersd_jax.weights.lora.convert import Source, text_encoders_of
from hypersd_jax.weights.lora.energy import EnergyReport, check_rank
from hypersd_jax.weights.lora.file import write_lora
from hypersd_jax.weights.lora.layout import COMPONENTS
from hypersd_jax.weights.lora.match import listing
from hypersd_jax.weights.lora.registry import check_layout

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""The modules of a text encoder's layers, which every reader of LoRAs knows."""


def extract_lora(
    base: Source, tuned: Source, dst: Source, *, rank: int, to: str = "kohya", dtype: Any = np.float32
) -> EnergyReport:
    """Writes the LoRA of a rank whose change of each kernel is closest to `tuned` - `base` in the Frobenius norm.

    Kernels that are the same in both models are not adapted. Host memory holds one component of `base` in its stored
    type, one kernel of `tuned`, and what is written.

    Args:
        base: a model as `open_model` reads it: a folder, a single file, or ``embedded``.
        tuned: another of the same shapes.
        dst: the file to write.
        rank: of every module, cut to the kernel's smaller side.
        to: a layout that is written (`registry.written_layouts`).
        dtype: of the written factors.

    Returns:
        what is kept of each module, and which changed parameters of UNet and text encoders no LoRA module holds (norms,
        biases, `conv_in`, ...).

    Raises:
        UserError: one line naming the file or key that is missing or damaged, models of different shapes or without a
            difference that a LoRA can hold, or a bad rank or layout.
    """
    check_layout(to)
    check_rank(rank)
    shapes, first = _open(base)
    others, second = _open(tuned)
    _require_same(base, shapes, tuned, others)
    adapters: dict[str, Adapter] = {}
    energy: dict[str, dict[str, tuple[float, float]]] = {}
    left_out: list[str] = []
    for component, parameters in shapes.items():
        targets = set(target_paths(parameters, TARGETS_14 if component == "unet" else TEXT_TARGETS))
        before = dict(first[component])
        for path, after in second[component]:
            change = after.astype(np.float32) - before.pop(path).astype(np.float32)
            if not change.any():
                continue
            module, _, leaf = path.rpartition(".")
            if leaf != "kernel" or module not in targets:
                left_out.append(f"{component}.{torch_key(path)}")
                continue
            entry, kept, total = low_rank(change, rank)
            adapters.setdefault(component, {})[module] = entry
            energy.setdefault(component, {})[module] = kept, total
    if not adapters:
        rest = f", only in {listing(left_out)}" if left_out else ""
        raise UserError(f"{tuned}: does not differ from {base} in any module that a LoRA adapts{rest}")
    write_lora(dst, adapters, layout=to, dtype=dtype, text_encoders=text_encoders_of(shapes), shapes=shapes)
    return EnergyReport(file=str(dst), modules=energy, left_out=tuple(left_out))


def _open(source: Source) -> tuple[dict[str, Mapping[str, Any]], Mapping[str, HostParams]]:
    """(shapes of the components that a LoRA may adapt, all components' parameters, read when they are iterated)."""
    stored = open_model(os.fspath(source))
    structure = parse(stored.description)
    parts = networks(structure, dict.fromkeys(structure.components, np.float32))
    shapes = {name: part.shapes for name, part in parts.items()}
    return {name: shapes[name] for name in COMPONENTS if name in shapes}, stored.read(shapes, dict.fromkeys(shapes))


def _require_same(
    base: Source, shapes: Mapping[str, Mapping[str, Any]], tuned: Source, others: Mapping[str, Mapping[str, Any]]
) -> None:
    for component in dict.fromkeys((*shapes, *others)):
        ours, theirs = shapes.get(component, {}), others.get(component, {})
        for path in dict.fromkeys((*ours, *theirs)):
            sides = (ours, theirs)
            pair = [torch_shape(path, tuple(side[path].shape)) if path in side else "missing" for side in sides]
            if pair[0] != pair[1]:
                raise UserError(f"{tuned}: {component}.{torch_key(path)} is {pair[1]}, but {pair[0]} in {base}")
