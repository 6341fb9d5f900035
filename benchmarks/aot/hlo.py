"""What a compiled program sends between chips, read from its HLO text."""

from __future__ import annotations

import re
from collections import defaultdict

SIZES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "s64": 8, "u64": 8, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z\-]+)\(")
_SHAPE = re.compile(rf"\b({'|'.join(SIZES)})\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:to_apply|branch_computations|called_computations|calls)=\{?([^},]+(?:, ?%[\w.\-]+)*)\}?")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')


def collectives(text: str) -> dict[str, dict[str, float]]:
    """Count and result bytes of each kind of collective on one chip; those within a loop times its turns."""
    bodies, entry = _computations(text)
    times: dict[str, int] = defaultdict(int)
    _walk(bodies, entry, 1, times)
    found: dict[str, dict[str, float]] = {}
    for name, count in times.items():
        for line in bodies[name]:
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            shape, operation = match.groups()
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                own = found.setdefault(kind, {"count": 0, "bytes": 0})
                own["count"] += count
                own["bytes"] += count * shape_bytes(_result(shape, operation))
    return found


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays of an HLO shape, of a tuple their sum."""
    total = 0
    for dtype, sides in _SHAPE.findall(shape):
        size = SIZES[dtype]
        for side in filter(None, sides.split(",")):
            size *= int(side)
        total += size
    return total


def _result(shape: str, operation: str) -> str:
    """Of an operation that is started and awaited the result alone: its shape is (operand, result, ...)."""
    if not operation.endswith("-start") or not shape.startswith("(") or operation.startswith("all-reduce"):
        return shape
    arrays = _SHAPE.findall(shape)
    dtype, sides = arrays[1] if len(arrays) > 1 else arrays[0]
    return f"{dtype}[{sides}]"


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match and not line.startswith(" "):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif name and line.startswith(" "):
            bodies[name].append(line.strip())
    return bodies, entry


def _walk(bodies: dict[str, list[str]], name: str, count: int, times: dict[str, int]) -> None:
    times[name] += count
    for line in bodies[name]:
        for called in _CALLED.findall(line):
            for each in re.split(r"[,\s%]+", called):
                if each in bodies:
                    _walk(bodies, each, count, times)
        if body := _BODY.search(line):
            trips = _TRIPS.search(line)
            _walk(bodies, body[1], count * (int(trips[1]) if trips else 1), times)
