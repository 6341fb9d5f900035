"""Safetensors files: read one tensor at a time from the memory map, written all at once or not at all."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes  # registers bfloat16 with NumPy, without which safetensors cannot hand out such tensors
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hypersd_jax.errors import UserError
from hypersd_jax.paths import expanded

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

MOST_AXES = 32
"""Most axes of a tensor that is read; NumPy's limit is 64."""

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
"""Type names of the safetensors header and the NumPy types that they are read as."""


class TensorFile:
    """An open safetensors file; nothing but its header is read until `read` asks for a tensor.

    Attributes:
        path: the file.
        metadata: the header's `__metadata__`, empty where there is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _refuse_what_is_no_weights_file(self.path)
        try:
            self._file: Any = safe_open(self.path, framework="np")
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            self._keys: list[str] = list(self._file.offset_keys())
            length, self._entries = _header(self.path)
            self._begin = 8 + length
        except (SafetensorError, OSError) as error:
            raise UserError(_diagnosis(self.path, error)) from error

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drops the memory map; arrays already read stay valid."""
        self._file = None

    def keys(self) -> list[str]:
        """Names of the tensors, in the order in which they lie in the file."""
        return list(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of tensor `key`, from the header."""
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> np.dtype:
        """Type of tensor `key`, from the header; UserError where it is a type that this package does not read."""
        name = self._slice(key).get_dtype()
        if name not in DTYPES:
            raise UserError(f"{self.path}: tensor {key} is stored as {name}, which is not read here")
        return DTYPES[name]

    def read(self, key: str) -> np.ndarray:
        """Tensor `key` in C order, in its stored type."""
        shape = self.shape(key)
        if len(shape) > MOST_AXES:
            raise UserError(f"{self.path}: tensor {key} has {len(shape)} axes")
        begin, end = self._entries[key]["data_offsets"]
        return self._bytes(begin, end).view(self.dtype(key)).reshape(shape)

    def read_row(self, key: str, row: int) -> np.ndarray:
        """Read one entry of tensor `key` along its first axis, in its stored type, and nothing else of it."""
        count, *shape = self.shape(key)
        begin, end = self._entries[key]["data_offsets"]
        length = (end - begin) // count
        return self._bytes(begin + row * length, begin + (row + 1) * length).view(self.dtype(key)).reshape(shape)

    def _bytes(self, begin: int, end: int) -> np.ndarray:
        """These bytes of the data. Read, not mapped: pages of a map count as memory in use until the file is closed."""
        with self.path.open("rb") as file:
            file.seek(self._begin + begin)
            found = np.fromfile(file, np.uint8, end - begin)
        if found.size < end - begin:
            raise UserError(f"{self.path}: was cut short while it was read")
        return found

    def _slice(self, key: str) -> Any:
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        try:
            return self._file.get_slice(key)
        except SafetensorError as error:
            raise KeyError(f"{self.path} holds no tensor {key}") from error


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a safetensors file, as a context manager or not.

    Raises:
        UserError: the file is missing, empty, cut short, a folder, a pickle, a Git LFS pointer, a web page, or anything
            else that is not safetensors.
    """
    return TensorFile(path)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file; `path` afterwards holds all of it or, after an error, what it held before.

    Parent folders are made. Raises UserError where the path cannot be written.
    """
    # asarray, for ascontiguousarray would turn a 0-d tensor (a LoRA's alpha) into a 1-d one.
    contiguous = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata) if metadata is not None else None)
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be written ({error})") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name in the folder of `path`; on success it becomes `path` in one step, on error it is removed.

    Parent folders are made. Raises UserError where the path cannot be written.
    """
    path = expanded(Path(path))
    if path.is_dir():
        raise UserError(f"{path}: is a folder, so no file of that name can be written")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask allows; safetensors would leave the owner alone
        try:
            yield temporary
            temporary.chmod(mode)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())  # else a power cut may keep the new name and lose the bytes
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _refuse_what_is_no_weights_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a .safetensors file")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(pickle_message(path))


def pickle_message(path: str | os.PathLike[str]) -> str:
    """The message about pickled weights, which are never read."""
    return f"{path}: pickled weights are not read, because a pickle can run any code; use the .safetensors file instead"


def _diagnosis(path: Path, error: Exception) -> str:
    """The reason why safetensors has refused a file."""
    if isinstance(error, OSError):
        return f"{path}: cannot be read ({error.strerror or error})"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return f"{path}: is empty"
    if start.startswith(b"version https://git-lfs"):
        return f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
    # A sound file begins with the header's length, whose bytes may be anything: other magic is looked at only after it.
    try:
        length, header = _header(path)
    except ValueError:
        if size > 8 and start[8:9] == b"{":
            return f"{path}: is truncated within its header"
        if start.startswith(b"PK\x03\x04") or (start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
            return pickle_message(path)
        if start.lstrip()[:1] == b"<":
            return f"{path}: is a web page, not a safetensors file; the download went wrong"
        return f"{path}: is not a safetensors file"
    expected = 8 + length + max((_end(entry) for entry in header.values()), default=0)
    if size < expected:
        return f"{path}: is truncated: it has {size} of {expected} bytes"
    return f"{path}: is not a valid safetensors file ({error})"


def _end(entry: Any) -> int:
    """Return where the tensor of a header's entry ends; 0 where the entry is unsound."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(offsets, list) and len(offsets) == 2 and isinstance(offsets[1], int):
        return offsets[1]
    return 0


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """(length in bytes, content) of the JSON header; ValueError where there is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("the header is longer than the file")
        try:
            header = json.loads(file.read(length))
        except RecursionError:
            raise ValueError("the header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return length, header
