"""One component of a diffusers folder: `config.json` and its safetensors, as parameters and back."""

from __future__ import annotations

import functools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.errors import UserError
from hypersd_jax.files import decoded
from hypersd_jax.weights.keys import (
    Kind,
    canonical_key,
    drop_pointwise,
    from_torch,
    is_extra,
    to_torch,
    torch_key,
    torch_shape,
)
from hypersd_jax.weights.placement import host, put
from hypersd_jax.weights.tensors import PICKLE_SUFFIXES, TensorFile, open_tensors, replacing, save_tensors

Params = dict[str, jax.Array]
Shapes = Mapping[str, jax.ShapeDtypeStruct]
ShardingRule = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]

STEMS: dict[Kind, str] = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "clip": "model",
}
"""The file names of each kind of component's weights in diffusers and transformers."""

HALF = "fp16"
# Numbers from which reading on two threads is worth having them.
MANY = 1_000_000
# Columns copied at a time: 64 bytes of float32.
STRIP = 16
T = TypeVar("T")
_LISTED = 8


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file; UserError names the file, and the line where it is no JSON."""
    path = Path(path)
    try:
        content = json.loads(_text(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: JSON that is nested too deeply, or with a number of too many digits") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}:1: expected a JSON object, found {type(content).__name__}")
    return content


def _text(path: Path) -> str:
    try:
        return decoded(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is not text, so not JSON ({error})") from None


def component_files(folder: str | os.PathLike[str], stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors files that together hold one component.

    Args:
        folder: the component's folder.
        stem: file name without suffixes, see `STEMS`.
        variant: such as "fp16"; None takes the plain files and, where there are none, the fp16 ones.

    Raises:
        UserError: the folder is missing, holds only pickles or no weights of this name, or its index is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for wanted in (variant,) if variant else (None, HALF):
        part = f".{wanted}" if wanted else ""
        single = folder / f"{stem}{part}.safetensors"
        index = folder / f"{stem}.safetensors.index{part}.json"
        if single.exists():
            return [single]
        if index.exists():
            return _shards(index)
    what = f"{stem}{f'.{variant}' if variant else ''}.safetensors"
    if any(path.name.startswith(stem) and path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        raise UserError(f"{folder}: no {what}, only pickled weights, which are not read because they can run any code")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    raise UserError(f"{folder}: no {what}" + (f", only {few(others)}" if others else ""))


def load_params(
    folder: str | os.PathLike[str],
    shapes: Shapes,
    *,
    dtype: Any,
    component_kind: Kind,
    sharding: ShardingRule | None = None,
    variant: str | None = None,
) -> Params:
    """Parameters of one component, read tensor by tensor: host memory holds a few at a time.

    Args:
        folder: the component's folder.
        shapes: what the network wants, `Network.shapes`.
        dtype: type to cast to, whatever the file's.
        component_kind: decides the file's name and the spellings that are understood.
        sharding: where each parameter goes; None is the default device.
        variant: see `component_files`.

    Raises:
        UserError: all missing, unexpected and ill-fitting tensors in one line, found before anything is read; or the
            first tensor that holds something else than finite numbers.
    """
    placed = {
        path: put(array, sharding(path, shapes[path]) if sharding else None)
        for path, array in read_params(folder, shapes, dtype=dtype, component_kind=component_kind, variant=variant)
    }
    return {path: placed[path] for path in shapes}


def read_params(
    folder: str | os.PathLike[str],
    shapes: Shapes,
    *,
    component_kind: Kind,
    dtype: Any = None,
    variant: str | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters that `load_params` places, a few at a time on the host, in the order of the files.

    Here `dtype` may be None, which keeps each tensor's own.
    """
    files = [open_tensors(path) for path in component_files(folder, STEMS[component_kind], variant)]

    def read(path: str, file: TensorFile, key: str) -> tuple[str, np.ndarray]:
        array = read_finite(file, key).reshape(torch_shape(path, shapes[path].shape))
        return path, cast(from_torch(path, array), dtype, file.path, key)

    found = _match(Path(folder), files, shapes, component_kind)
    tasks = [functools.partial(read, path, *place) for path, place in found.items()]
    if sum(math.prod(shapes[path].shape) for path in found) < MANY:
        yield from (task() for task in tasks)
    else:
        yield from _ahead(tasks)


def save_params(
    folder: str | os.PathLike[str],
    params: Mapping[str, jax.Array | np.ndarray],
    *,
    config: Mapping[str, Any],
    component_kind: Kind,
    dtype: Any = None,
) -> None:
    """Writes `config.json` and one safetensors file as diffusers and transformers do; existing ones are replaced.

    Args:
        folder: the component's folder, made where missing.
        params: the parameters.
        config: content of `config.json`; a type that it names (`dtype`, `torch_dtype`) is set to the one written.
        component_kind: decides the file's name.
        dtype: type to write; None keeps that of each parameter.

    Raises:
        UserError: the folder holds a sharded model, which readers would still prefer, or cannot be written; or a
            value is too large for `dtype`.
    """
    folder = Path(folder)
    stem = STEMS[component_kind]
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        raise UserError(f"{index}: the folder holds a sharded model; write to another one")
    tensors = {}
    for path, value in params.items():
        key = torch_key(path)
        tensors[key] = cast(to_torch(path, host(value)), dtype, folder, key)
    written = dict(config)
    types = {str(array.dtype) for array in tensors.values()}
    for key in ("dtype", "torch_dtype"):
        if key in written and len(types) == 1:
            written[key] = next(iter(types))
    save_tensors(folder / f"{stem}.safetensors", tensors, {"format": "pt"})
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    names = sorted({name for name in weight_map.values() if isinstance(name, str)})
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: its weight_map holds something else than file names")
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: names {name}, which lies outside the folder")
    present = {path.name for path in index.parent.iterdir()}
    missing = [name for name in names if name not in present]
    if missing:
        raise UserError(f"{index}: names {len(missing)} missing file(s): {few(missing)}")
    return [index.parent / name for name in names]


def _match(folder: Path, files: list[TensorFile], shapes: Shapes, kind: Kind) -> dict[str, tuple[TensorFile, str]]:
    """The location of each parameter, in the order of the files; UserError with all that does not fit."""
    wanted = {torch_key(path): path for path in shapes}
    found: dict[str, tuple[TensorFile, str]] = {}
    unexpected, misfits = [], []
    for file in files:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            name = canonical_key(key, kind)
            path = wanted.get(name)
            if path is None:
                if not is_extra(name, kind):
                    unexpected.append(key)
                continue
            stored, expected = file.shape(key), torch_shape(path, shapes[path].shape)
            if path in found:
                misfits.append(f"{key} stored twice")
            elif drop_pointwise(name, stored, kind) != expected:
                misfits.append(f"{key} {list(stored)} instead of {list(expected)}")
            elif not jnp.issubdtype(file.dtype(key), jnp.floating):
                misfits.append(f"{key} of type {file.dtype(key)}")
            found[path] = (file, key)
    missing = [name for name, path in wanted.items() if path not in found]
    require_fit(folder, missing, unexpected, misfits)
    return found


def require_fit(where: Path, missing: list[str], unexpected: list[str], misfits: list[str]) -> None:
    """One UserError with all the tensors that do not fit the networks they are for."""
    problems = [
        f"{len(names)} {what} ({few(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("ill-fitting", misfits))
        if names
    ]
    if problems:
        raise UserError(f"{where}: the tensors do not fit the configuration: " + "; ".join(problems))


def read_finite(file: TensorFile, key: str) -> np.ndarray:
    """A stored tensor; UserError where it holds NaN or infinity."""
    stored = file.read(key)
    if not np.isfinite(stored).all():
        raise UserError(f"{file.path}: tensor {key} holds NaN or infinity")
    return stored


def cast(array: np.ndarray, dtype: Any, file: Path, key: str) -> np.ndarray:
    """Finite values in C order and in `dtype` (None: their own); UserError where they are too large for it."""
    if dtype is None:
        return _in_order(array, array.dtype)
    dtype = np.dtype(dtype)
    with np.errstate(over="ignore"):
        result = _in_order(array, dtype)
    if jnp.finfo(dtype).max < jnp.finfo(array.dtype).max and not np.isfinite(result).all():
        raise UserError(f"{file}: tensor {key} does not fit into {dtype}")
    return result


def _in_order(array: np.ndarray, dtype: Any) -> np.ndarray:
    """An array in C order and in `dtype`.

    A transposed one is copied in strips that fit in cache lines: two to five times as fast as NumPy copies it.
    """
    if array.ndim < 2 or array.flags.c_contiguous:
        return array.astype(dtype, order="C", copy=False)
    result = np.empty(array.shape, dtype)
    for start in range(0, array.shape[-1], STRIP):
        result[..., start : start + STRIP] = array[..., start : start + STRIP]
    return result


def _ahead(tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The outcomes of tasks in their order, worked on by two threads that stay a few ahead."""
    with ThreadPoolExecutor(2) as pool:
        pending: deque[Future[T]] = deque()
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def few(names: Iterable[str]) -> str:
    """The first of these names, as one text."""
    names = list(names)
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
