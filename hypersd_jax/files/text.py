"""One rule for the text in users' files: UTF-8, with or without a byte-order mark, and nothing else."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_LINE_BREAK = re.compile(r"\r\n|\r|\n")


def decoded(data: bytes) -> str:
    """Decode text.

    Raises:
        ValueError: it is not UTF-8, or holds zero bytes as UTF-16 does; says where.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
        at = text.find("\0")
    except UnicodeDecodeError as error:
        raise ValueError(_complaint(data, error.start)) from None
    if at >= 0:
        raise ValueError(_complaint(data, len(text[:at].encode())))
    return text


def _complaint(data: bytes, at: int) -> str:
    line = len(_LINE_BREAK.findall(data[:at].decode("latin-1"))) + 1
    return f"line {line} is not UTF-8 text (byte 0x{data[at]:02x})"


def lines_of(text: str) -> list[str]:
    """Split text into lines at line feeds and carriage returns alone: a caption may hold other separators."""
    lines = _LINE_BREAK.split(text)
    return lines if lines[-1] else lines[:-1]


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file: one a line, or those of a table as benchmarks publish them; empty ones are left out.

    ``.tsv`` is a table with a column ``Prompt`` (PartiPrompts), ``.jsonl`` has an object a line with a key ``prompt``
    (GenEval).

    Raises:
        ValueError: what is wrong with the file, in a line that does not name it.
    """
    try:
        lines = lines_of(decoded(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    read = {".tsv": _column, ".jsonl": _objects}.get(path.suffix.lower(), list)
    found = [prompt.strip() for prompt in read(lines) if prompt.strip()]
    if not found:
        raise ValueError("holds no prompt")
    return found


def _column(lines: Sequence[str]) -> list[str]:
    names, *rows = (line.split("\t") for line in lines) if lines else ([""],)
    index = next((index for index, name in enumerate(names) if name.strip().lower() == "prompt"), None)
    if index is None:
        raise ValueError(f"has no column Prompt, only {', '.join(names)}")
    return [row[index] for row in rows if len(row) > index]


def _objects(lines: Iterable[str]) -> list[str]:
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str):
            raise ValueError(f"line {number} is no object with a text under the key prompt")
        found.append(prompt)
    return found
