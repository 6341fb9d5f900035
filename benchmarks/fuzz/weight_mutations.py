"""Safetensors files with one thing wrong: in the bytes, in the header, or in the tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from benchmarks.fuzz.json_mutations import damage_text, flip, mutate_object, odd
from benchmarks.fuzz.tensor_mutations import SIZES, TENSORS, Header, joined, packed, split, unpacked

UNREAD = ("F8_E8M0", "F4", "C64", "Q8", "f32", "", "F32 ", 7, None, ["F32"])


def mutate_weights(content: bytes, random: Random) -> tuple[str, bytes]:
    """(what was done, the changed file)."""
    kind = random.choices(("bytes", "header", "tensors"), (1, 2, 3))[0]
    table: dict[str, Any] = {"bytes": _BYTES, "header": _HEADERS, "tensors": TENSORS}[kind]
    name = random.choice(tuple(table))
    if kind == "bytes":
        return f"bytes: {name}", table[name](content, random)
    if kind == "header":
        header, data = split(content)
        return f"header: {name}", joined(table[name](header, random), data)
    tensors, metadata = unpacked(content)
    if not tensors:
        return "bytes: flipped", flip(content, random)
    metadata = table[name](tensors, metadata, random)
    return f"tensors: {name}", packed(tensors, metadata)


def _length(content: bytes, random: Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    other = random.choice((0, 1, length - 1, length + 1, length * 2, len(content), 2**31, 2**63, 2**64 - 1, 10**8))
    return struct.pack("<Q", max(other, 0)) + content[8:]


def _hole(content: bytes, random: Random) -> bytes:
    begin = random.randrange(len(content))
    return content[:begin] + content[begin + random.choice((1, 8, 100)) :]


_BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    "flipped": flip,
    "flipped in the header": lambda content, random: content[:8] + flip(content[8:400], random) + content[400:],
    "cut": lambda content, random: content[: random.randrange(len(content))],
    "cut early": lambda content, random: content[: random.randrange(min(len(content), 64))],
    "appended": lambda content, random: content + random.randbytes(random.choice((1, 8, 4096))),
    "a hole": _hole,
    "another header length": _length,
    "another file": lambda content, random: random.choice((b"", b"PK\x03\x04", b"\x80\x02}", b"<html>", b"\0" * 9)),
}


def _entry(header: Header, random: Random) -> Any:
    """The header's entry of one tensor."""
    return header[random.choice([key for key in header if key != "__metadata__"])]


def _header_offsets(header: Header, random: Random) -> Header:
    entry, other = _entry(header, random), _entry(header, random)
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = random.choice(
        (
            *([end, begin], [begin, end + 1], [begin + 1, end], [begin - 1, end], [0, end], [begin, 2**63]),
            *([2**64 - 1, 0], [-8, -4], [begin], [], [begin, end, end], [float(begin), float(end)], ["0", "4"]),
            *(other["data_offsets"], None, {}, "0", [None, None], [10**30, 10**31], [[0], [1]]),
        )
    )
    return header


def _header_dtype(header: Header, random: Random) -> Header:
    _entry(header, random)["dtype"] = random.choice((*SIZES, *UNREAD))
    return header


def _header_shape(header: Header, random: Random) -> Header:
    entry = _entry(header, random)
    shape = list(entry["shape"])
    at = random.randrange(len(shape)) if shape else 0
    one = random.choice((0, -1, 1, 2, 10**6, 2**31, 2**32, 2**62, 2**63, 10**30, 0.5, 4.0, "4", None, [4], True))
    entry["shape"] = random.choice(
        (
            [*shape[:at], one, *shape[at + 1 :]],
            [*shape, one],
            shape[1:],
            shape[::-1],
            [],
            [2**32] * 2,
            [1] * 300,
            odd(random),
        )
    )
    return header


def _header_entry(header: Header, random: Random) -> Header:
    key = random.choice([key for key in header if key != "__metadata__"])
    if random.random() < 0.5:
        header[key] = odd(random)
    else:
        entry = header[key]
        field = random.choice(("dtype", "shape", "data_offsets"))
        header[key] = {name: value for name, value in entry.items() if name != field}
        if random.random() < 0.3:
            header[key] = {**entry, "extra": odd(random)}
    return header


def _header_metadata(header: Header, random: Random) -> Header:
    header["__metadata__"] = random.choice((odd(random), {"a": odd(random)}, {"a": "1" * 10**5}))
    return header


def _header_text(header: Header, random: Random) -> bytes:
    return damage_text(json.dumps(header).encode("utf-8"), random)[1]


def _header_tree(header: Header, random: Random) -> Header:
    return mutate_object(header, random)[1]


_HEADERS: dict[str, Callable[[Header, Random], Header | bytes]] = {
    "offsets": _header_offsets,
    "a type": _header_dtype,
    "a shape": _header_shape,
    "an entry": _header_entry,
    "metadata of no text": _header_metadata,
    "text": _header_text,
    "tree": _header_tree,
    "padded": lambda header, random: json.dumps(header).encode() + b" " * random.choice((1, 8, 10**5)),
    "padded in front": lambda header, _: b" " + json.dumps(header).encode(),
}
