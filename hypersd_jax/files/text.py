"""One rule for the text in users' files: UTF-8, with or without a byte-order mark, and nothing else."""

from __future__ import annotations

import codecs
import re

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
