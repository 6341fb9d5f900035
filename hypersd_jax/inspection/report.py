"""A report: everything as JSON, and the same in lines for a reader."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN = 100
_LABEL = 11


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found.

    Attributes:
        data: values of JSON; all of it.
        lines: the same for a reader, in which long lists are counted.
    """

    data: Mapping[str, Any]
    lines: Sequence[str]


def labelled(label: str, text: str) -> str:
    """One line of a report: what it speaks of, and what is so."""
    return f"  {label:<{_LABEL}} {text}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table, the first cell from the left and the others from the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def metadata_lines(metadata: Mapping[str, str]) -> list[str]:
    """A header's entries, a line each, long values cut."""
    return [labelled("header", f"{key} = {shortened(metadata[key])}") for key in sorted(metadata)]


def shortened(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}... ({len(text)} characters)"


def command(*words: str) -> str:
    """A command line, quoted for a shell."""
    return shlex.join(words)


def option(name: str, value: str) -> list[str]:
    """An option and its value as words of a command; joined where the value would be taken for an option."""
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def printable(line: str) -> str:
    """A line without characters that move a terminal's cursor or change its colours: files hold anything."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)


def size_text(count: int) -> str:
    """A number of bytes for a reader."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.4g} {unit}"
    return f"{count} bytes"


def counted(count: int, what: str) -> str:
    """``1 key``, ``2 keys``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")
