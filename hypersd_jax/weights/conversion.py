"""A model from one layout into another, with LoRAs merged into it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.adapters import altered, concatenate, merge, scaled
from hypersd_jax.errors import UserError
from hypersd_jax.paths import expanded
from hypersd_jax.weights.assembly import Shapes, networks, parse
from hypersd_jax.weights.components import open_model
from hypersd_jax.weights.diffusers.component import cast
from hypersd_jax.weights.diffusers.model import require_free, write_folder
from hypersd_jax.weights.hub import fetch_lora
from hypersd_jax.weights.keys import torch_key
from hypersd_jax.weights.lora import LoraFile, read_lora
from hypersd_jax.weights.single_file import write_single_file

MODEL_LAYOUTS = ("diffusers", "single-file")

Source = str | os.PathLike[str]


def convert_model(
    src: Source,
    dst: Source,
    to: str,
    *,
    loras: Sequence[tuple[Source, float]] = (),
    dtype: Any = None,
) -> None:
    """Write a model in another layout, or in the same one with LoRAs in it.

    On the host, a component at a time for a folder; a single file is gathered in memory before it is written.

    Args:
        src: a diffusers folder, a single .safetensors file, or ``embedded``.
        dst: the folder, new or empty, or the .safetensors file to write.
        to: "diffusers" or "single-file".
        loras: (file, folder or hub id, scale) pairs, merged together in float32 and rounded once to each kernel's type.
        dtype: type to write; None keeps that of each tensor.

    Raises:
        UserError: one line naming the file or key that is unsupported or damaged, does not fit, or cannot be written;
            nothing is left behind then.
    """
    if to not in MODEL_LAYOUTS:
        raise UserError(f"model layout {to!r}: choose one of {', '.join(MODEL_LAYOUTS)}")
    if to == "diffusers":
        require_free(expanded(Path(dst)))
    stored = open_model(os.fspath(src))
    structure = parse(stored.description)
    parts = networks(structure, dict.fromkeys(structure.components, np.float32))
    shapes = {name: part.shapes for name, part in parts.items()}
    files = _read_loras(loras, {name: shape for name, shape in shapes.items() if name != "vae"})
    reading = stored.read(shapes, dict.fromkeys(shapes))

    def weights(name: str) -> Mapping[str, np.ndarray]:
        params = dict(reading[name])
        return {**params, **_merged(params, name, files, dtype, Path(dst))}

    write = write_folder if to == "diffusers" else write_single_file
    write(stored.description, dst, weights, dtype=dtype)


def _read_loras(loras: Sequence[tuple[Source, float]], shapes: Mapping[str, Shapes]) -> list[tuple[LoraFile, float]]:
    for file, scale in loras:
        if not math.isfinite(scale):
            raise UserError(f"the scale of LoRA {str(file)!r} must be a finite number, not {scale}")
    return [(read_lora(fetch_lora(file), shapes), scale) for file, scale in loras]


def _merged(
    params: Mapping[str, np.ndarray], component: str, files: Sequence[tuple[LoraFile, float]], dtype: Any, target: Path
) -> dict[str, np.ndarray]:
    """The parameters that LoRAs change, one module at a time, on the CPU whatever the default device."""
    adapter = concatenate([scaled(file.adapters.get(component, {}), scale) for file, scale in files])
    stack = [(file.differences.get(component, {}), scale) for file, scale in files]
    modules = dict.fromkeys([*adapter, *(module for differences, _ in stack for module in differences)])
    changed = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for module in modules:
            paths = [path for leaf in ("kernel", "scale", "bias") if (path := f"{module}.{leaf}") in params]
            weights = {path: jnp.asarray(params[path], jnp.float32) for path in paths}
            weights |= altered(weights, [({module: part[module]}, scale) for part, scale in stack if module in part])
            if module in adapter:
                weights = merge(weights, {module: adapter[module]})
            for path, value in weights.items():
                stored = params[path].dtype if dtype is None else dtype
                changed[path] = cast(np.asarray(value), stored, target, torch_key(path))
    return changed
