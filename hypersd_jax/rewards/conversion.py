"""A PyTorch file's weights as safetensors: the one place where such a file is read, and with tensors alone allowed."""

from __future__ import annotations

import importlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hypersd_jax.errors import UserError, short, shown
from hypersd_jax.paths import expanded
from hypersd_jax.weights.diffusers.component import few
from hypersd_jax.weights.tensors import DTYPES, save_tensors

STATE = "state_dict"
"""The entry under which some files keep the weights, beside what else a training run saved."""


def convert_reward(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
    """Write the tensors of a PyTorch file as safetensors, under their names and in their types.

    `torch.load` reads with ``weights_only=True``: a file that holds anything but plain values and tensors is refused
    and none of its code is run.

    Args:
        source: a file of `torch.save`: a dictionary of tensors, or one that has it under ``state_dict``.
        destination: the .safetensors file; replaced whole or not at all.

    Raises:
        UserError: torch is not installed; or one line naming the file, or its entry, that cannot be read or written.
    """
    source, destination = expanded(Path(source)), expanded(Path(destination))
    if destination.suffix != ".safetensors":
        raise UserError(f"{destination}: the name of the file to write must end in .safetensors")
    if not source.is_file():
        raise UserError(f"{source}: {'is a folder, expected a file' if source.is_dir() else 'no such file'}")
    torch = _torch()
    weights = _weights(source, _load(torch, source))
    other = [str(key) for key, value in weights.items() if not (isinstance(key, str) and torch.is_tensor(value))]
    if other or not weights:
        raise UserError(f"{source}: " + (f"{few(other)} is no tensor under a name" if other else "holds no tensors"))
    save_tensors(
        destination, {key: _array(torch, source, key, value) for key, value in weights.items()}, {"format": "pt"}
    )


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError("reading a PyTorch file takes torch: pip install 'hypersd_jax[torch]'") from None


def _load(torch: Any, source: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's version, in words for those who wrote the file
            # Only the zip archives that PyTorch writes since 1.6 can be mapped into memory.
            return torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except Exception as error:  # the library raises many kinds on broken files
        reason = short(next(iter(str(error).splitlines()), type(error).__name__))
        if isinstance(error, pickle.UnpicklingError):  # whose message is about reading it all the same
            reason = "it is damaged, or holds something else than tensors and plain values"
        raise UserError(f"{source}: cannot be read as the weights of a PyTorch model ({reason})") from None


def _weights(source: Path, content: Any) -> Mapping[Any, Any]:
    found = content.get(STATE, content) if isinstance(content, Mapping) else content
    if not isinstance(found, Mapping):
        raise UserError(f"{source}: holds {shown(type(found).__name__)}, not a dictionary of tensors")
    return found


def _array(torch: Any, source: Path, key: str, tensor: Any) -> np.ndarray:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise UserError(f"{source}: {key} is sparse or quantized, which is not converted")
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not have
        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    try:
        array = np.asarray(tensor.numpy())
    except TypeError:
        array = None
    if array is None or array.dtype not in DTYPES.values():
        raise UserError(f"{source}: {key} is of type {tensor.dtype}, which is not converted")
    return array
