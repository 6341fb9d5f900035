"""A machine's report as lines to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

BYTES = ("total", "available", "limit", "used", "free", "bytes")
"""Keys whose numbers are bytes."""

UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Write each section under its name, and the warnings last."""
    lines = []
    for name, section in report.items():
        if name != "warnings":
            lines += [name, *_lines(section, "  ")]
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return lines if report["warnings"] else [*lines, "no warnings"]


def bytes_text(size: float) -> str:
    """Write a number of bytes in the decimal unit that suits it: 3.21 GB, 45 kB."""
    for unit, amount in UNITS:
        if size >= amount:
            return f"{size / amount:.3g} {unit}" if size < 1000 * amount else f"{size / amount:,.0f} {unit}"
    return f"{size:.0f} bytes"


def _lines(section: Mapping[str, Any], indent: str) -> Iterator[str]:
    plain = [key for key, value in section.items() if not isinstance(value, Mapping)]
    width = max(map(len, plain), default=0)
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}"
            yield from _lines(value, f"{indent}  ")
        else:
            yield f"{indent}{key:{width}s}  {_value(key, value)}"
    if not section:
        yield f"{indent}none"


def _value(key: str, value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, list | Mapping):
        parts = [f"{name} {_value(name, each)}" for name, each in value.items()] if isinstance(value, Mapping) else []
        return "; ".join(parts or [_value(key, each) for each in value]) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key in BYTES and isinstance(value, int):
        return bytes_text(value)
    return f"{value:.2g}" if isinstance(value, float) else str(value)
