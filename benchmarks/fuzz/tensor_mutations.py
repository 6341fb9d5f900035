"""Safetensors files taken apart and put together, and soundly laid out ones with something wrong in their tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from benchmarks.fuzz.json_mutations import damage_text, mutate_object, odd

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "BOOL": 1}
ALPHAS = (0, -1, 1, 1e-45, 1e-30, 1e30, 3.4e38, 1e300, float("nan"), float("inf"), -float("inf"))

Header = dict[str, Any]
Tensor = tuple[str, str, list[int], bytes]
"""Key, type, shape, data."""


def split(content: bytes) -> tuple[Header, bytes]:
    """(header, data) of a sound file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Header | bytes, data: bytes) -> bytes:
    """A file of this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8")
    return struct.pack("<Q", len(text)) + text + data


def packed(tensors: list[Tensor], metadata: Any = None) -> bytes:
    """A sound file of these tensors."""
    header: Header = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for key, dtype, shape, data in tensors:
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    return joined(header, b"".join(data for *_, data in tensors))


def unpacked(content: bytes) -> tuple[list[Tensor], Any]:
    """The inverse of `packed`."""
    header, data = split(content)
    metadata = header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
    return [(k, e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for k, e in entries], metadata


def _count(shape: list[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _rename(tensors: list[Tensor], metadata: Any, random: Random) -> Any:
    at = random.randrange(len(tensors))
    key, *rest = tensors[at]
    parts = key.split(".")
    part = random.randrange(len(parts))
    other = random.choice(tensors)[0].split(".")
    renamed = random.choice(
        (
            ".".join(parts[:part] + parts[part + 1 :]),
            ".".join([*parts[:part], random.choice(other), *parts[part + 1 :]]),
            key + random.choice(("x", ".", ".weight", "\n", "é", ".alpha", ".bias", "." * 1000)),
            random.choice(("", "x.", "model.", "text_model.", "lora_unet_", "unet.", "module.")) + key,
            key.replace("0", random.choice(("1", "00", "-1", "999999999999999999999", "٣"))),
            key.replace("_", "."),
            key.swapcase(),
            key[: random.randrange(len(key) + 1)],
        )
    )
    if all(renamed != name for name, *_ in tensors):
        tensors[at] = (renamed, *rest)
    return metadata


def _again(tensors: list[Tensor], metadata: Any, random: Random) -> Any:
    """Add a tensor once more, in another known spelling where it has one."""
    key, *rest = random.choice(tensors)
    spellings = {
        key.replace("text_model.", ""),
        "text_model." + key,
        key.replace(".to_q.", ".query."),
        key.replace(".to_out.0.", ".proj_attn."),
        key.replace("lora_te_", "lora_te1_"),
        key.replace("lora_unet_", "lycoris_"),
        key.replace(".lora_A.weight", ".lora.down.weight"),
        key.replace(".lora_A.weight", ".lora_A.default.weight"),
        key.replace(".mid.attn_1.q.", ".mid.attn_1.to_q."),
        key.replace("transformer.text_model.", "transformer."),
        key + ".again",
    } - {name for name, *_ in tensors}
    tensors.append((random.choice(sorted(spellings)), *rest))
    return metadata


def _drop(tensors: list[Tensor], metadata: Any, random: Random) -> Any:
    for _ in range(random.choice((1, 1, 2, len(tensors)))):
        if tensors:
            tensors.pop(random.randrange(len(tensors)))
    return metadata


def _poison(tensors: list[Tensor], metadata: Any, random: Random) -> Any:
    at = random.randrange(len(tensors))
    key, dtype, shape, data = tensors[at]
    size = SIZES.get(dtype, 1)
    if data:
        start = random.randrange(len(data) // size) * size
        bad = random.choice(
            (b"\xff" * size, b"\0" * (size - 2) + b"\x80\x7f" if size > 1 else b"\x7f", b"\xff\xff\xff\x7f"[-size:])
        )
        data = data[:start] + bad[:size].ljust(size, b"\xff") + data[start + size :]
    tensors[at] = (key, dtype, shape, data)
    return metadata


def _reshape(tensors: list[Tensor], metadata: Any, random: Random) -> Any:
    """Another shape of as many values."""
    at = random.randrange(len(tensors))
    key, dtype, shape, data = tensors[at]
    count = _count(shape)
    other = random.choice(
        (
            shape[::-1],
            [*shape, 1],
            [*shape, 1, 1],
            [1, *shape],
            [count],
            [1, count],
            [count, 1],
            shape + [1] * 30,
            shape[1:] + shape[:1],
        )
    )
    tensors[at] = (key, dtype, other, data)
    return metadata


def _resize(tensors: list[Tensor], metadata: Any, random: Random) -> Any:
    """Another number of values, none included."""
    at = random.randrange(len(tensors))
    key, dtype, shape, _ = tensors[at]
    axis = random.randrange(len(shape)) if shape else 0
    length = random.choice((0, 1, 2, 3, 5, 16, 1000))
    other = (
        [*shape[:axis], length, *shape[axis + 1 :]]
        if random.random() < 0.8
        else random.choice(([], [0], [2], [0, 2**40]))
    )
    if _count(other) * SIZES.get(dtype, 1) < 2**20:
        tensors[at] = (key, dtype, other, random.randbytes(_count(other) * SIZES.get(dtype, 1)))
    return metadata


def _rank(tensors: list[Tensor], metadata: Any, random: Random) -> Any:
    """Every axis of one length in the file gets another, as where a LoRA's rank is 0 or many thousands."""
    lengths = {length for *_, shape, _ in tensors for length in shape}
    if not lengths:
        return metadata
    old, new = random.choice(sorted(lengths)), random.choice((0, 1, 3, 300, 20_000))
    changed = [(key, dtype, [new if n == old else n for n in shape]) for key, dtype, shape, _ in tensors]
    if sum(_count(shape) for *_, shape in changed) < 2**19:
        tensors[:] = [(key, dtype, shape, bytes(_count(shape) * SIZES.get(dtype, 1))) for key, dtype, shape in changed]
    return metadata


def _retype(tensors: list[Tensor], metadata: Any, random: Random) -> Any:
    at = random.randrange(len(tensors))
    key, _, shape, _ = tensors[at]
    dtype = random.choice(tuple(SIZES))
    tensors[at] = (key, dtype, shape, bytes(_count(shape) * SIZES[dtype]))
    return metadata


def _swap(tensors: list[Tensor], metadata: Any, random: Random) -> Any:
    """Swap two tensors."""
    first, second = random.randrange(len(tensors)), random.randrange(len(tensors))
    one, two = tensors[first], tensors[second]
    tensors[first], tensors[second] = (two[0], *one[1:]), (one[0], *two[1:])
    return metadata


def _alpha(tensors: list[Tensor], metadata: Any, random: Random) -> Any:
    """A scalar, such as a LoRA's alpha, of an odd value or size."""
    scalars = [at for at, (_, _, shape, _) in enumerate(tensors) if not shape]
    at = random.choice(scalars or range(len(tensors)))
    dtype, kind = random.choice((("F32", "<f4"), ("F64", "<f8"), ("F16", "<f2")))
    count = random.choice((1, 1, 1, 0, 2))
    with np.errstate(over="ignore"):
        data = np.full(count, random.choice(ALPHAS)).astype(kind).tobytes()
    tensors[at] = (tensors[at][0], dtype, random.choice(([], [1])) if count == 1 else [count], data)
    return metadata


def _metadata(_tensors: list[Tensor], metadata: Any, random: Random) -> Any:
    """Header entries: JSON inside of them changed, or the settings that a LoRA states."""
    entries = dict(metadata or {})
    inner = [key for key, value in entries.items() if value.startswith("{")]
    if inner and random.random() < 0.7:
        key = random.choice(inner)
        changed = (
            damage_text(entries[key].encode(), random)[1].decode("utf-8", "replace")
            if random.random() < 0.3
            else json.dumps(mutate_object(json.loads(entries[key]), random)[1])
        )
        return {**entries, key: changed}
    key = random.choice(("steps", "eta", "guidance", "timesteps", "sampler", "original_inference_steps", *entries))
    value = random.choice(
        (json.dumps(odd(random)), "[" * 10**5, "9" * 5000, "", "x", "[1e999]", "[999, 1]", "tcd", "4")
    )
    return {**entries, key: value}


TENSORS: dict[str, Callable[[list[Tensor], Any, Random], Any]] = {
    "renamed": _rename,
    "one in two spellings": _again,
    "dropped": _drop,
    "not finite": _poison,
    "reshaped": _reshape,
    "resized": _resize,
    "one length changed": _rank,
    "another type": _retype,
    "two swapped": _swap,
    "an odd scalar": _alpha,
    "metadata": _metadata,
}
