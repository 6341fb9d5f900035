"""What sort of thing a path is, by its name, its files and the first bytes: no JAX yet, and nothing is run."""

from __future__ import annotations

import os
from pathlib import Path

from hypersd_jax.errors import UserError
from hypersd_jax.files import IMAGE_ENDINGS
from hypersd_jax.weights.lora.survey import looks_like_lora
from hypersd_jax.weights.tensors import open_tensors

LORA, MODEL, COMPONENT, IMAGE, RUN, CHECKPOINTS = "LoRA", "model", "component", "image", "run", "checkpoints"

_LORA_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_config.json")


def sort_of(path: Path) -> str:
    """LORA, MODEL, COMPONENT, IMAGE, RUN or CHECKPOINTS.

    Raises:
        UserError: it is none of these, is broken, or a pickle; says why.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        return _sort_of_folder(path)
    if path.suffix.lower() in IMAGE_ENDINGS:
        return IMAGE
    with open_tensors(path) as tensors:
        return LORA if looks_like_lora(tensors) else MODEL


def _sort_of_folder(folder: Path) -> str:
    if (folder / "model_index.json").is_file():
        return MODEL
    if (folder / "config.yaml").is_file():
        return RUN
    if any((folder / name).is_file() for name in _LORA_FILES):
        return LORA
    if (folder / "config.json").is_file():
        return COMPONENT
    if checkpoint_steps(folder):
        return CHECKPOINTS
    tensors = sorted(folder.glob("*.safetensors"))
    if len(tensors) == 1:
        return sort_of(tensors[0])
    if tensors:
        raise UserError(f"{folder}: a folder of {len(tensors)} .safetensors files; name one, such as {tensors[0]}")
    raise UserError(f"{folder}: neither a model, a LoRA, a run's output nor checkpoints")


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder; [] where it holds none."""
    return sorted(
        int(path.name)
        for path in folder.iterdir()
        if path.name.isdecimal() and (path / "_CHECKPOINT_METADATA").is_file()
    )
