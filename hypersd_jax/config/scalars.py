"""Single values from their text: the type of the field decides how it is read."""

from __future__ import annotations

import math
import os
import re
from typing import Any

from hypersd_jax.errors import UserError, short, shown

NULLS = ("null", "~", "")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_SAID_OTHERWISE = {
    **dict.fromkeys(("yes", "y", "on", "1", "t"), "true"),
    **dict.fromkeys(("no", "n", "off", "0", "f"), "false"),
}
# In quotes, or up to the next comma.
_PART = re.compile(r"""\s*('(?:[^']|'')*'|"[^"]*"|[^,]*?)\s*(?:,|$)""")
# Python reads no longer texts as whole numbers.
_MAX_DIGITS = 4000


class Words(str):
    """Text whose type is open: an unquoted value of a recipe, or all text after ``key=``."""

    __slots__ = ()


def is_null(value: Any) -> bool:
    """Tell whether a value leaves a key that may be null empty."""
    return value is None or (isinstance(value, Words) and value.strip() in NULLS)


def to_text(value: Any, path: str, *, is_path: bool, optional: bool) -> str:
    """Read text as it is written.

    Args:
        value: what was given.
        path: its dotted key, for errors.
        is_path: bytes that are not UTF-8, as file names may have them, are let through.
        optional: the key may be null, so the text ``null`` itself is written in quotes.

    Raises:
        UserError: it is no text, or not UTF-8.
    """
    if not isinstance(value, str) or (isinstance(value, Words) and not value):
        raise UserError(f"{path} must be text, not {quoted(value) if value != '' else 'nothing'}")
    text = str(value)
    if optional and isinstance(value, Words) and text in ("'null'", '"null"'):
        return "null"
    return text if is_path else utf8(text, path)


def utf8(text: str, what: str) -> str:
    """Decode what the system could not read in its own encoding, where it is UTF-8.

    Raises:
        UserError: it is not; names ``what``.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UserError(f"{what} must be UTF-8 text, not {shown(os.fsencode(text))[1:]}") from None


def to_int(value: Any, path: str) -> int:
    """Read a whole number in decimal digits: ``010`` is ten, and ``0x10``, ``1_000``, ``1:30`` are refused."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value.strip() if isinstance(value, str) else ""
    if _WHOLE.fullmatch(text) and len(text) <= _MAX_DIGITS:
        return int(text)
    raise UserError(f"{path} must be a whole number, not {quoted(value)}{_plainly(text)}")


def to_float(value: Any, path: str) -> float:
    """Read a finite decimal number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = repr(value) if isinstance(value, float) else f"{value:d}"
    else:
        text = value.strip() if isinstance(value, str) else ""
    number = float(text) if _DECIMAL.fullmatch(text) else math.nan
    if math.isfinite(number):
        return number
    what = "a number" if text[:1] in ("", "[", "{") else "a finite number"
    raise UserError(f"{path} must be {what}, not {quoted(value)}{_plainly(text)}")


def to_bool(value: Any, path: str) -> bool:
    """Read ``true`` or ``false``."""
    if isinstance(value, bool):
        return value
    text = value.strip() if isinstance(value, str) else str(value)
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    meant = _SAID_OTHERWISE.get(text.lower())
    raise UserError(f"{path} must be true or false, not {quoted(value)}{f' (write {meant})' if meant else ''}")


def split_list(text: str) -> list[Any]:
    """Split the values of ``[a, b]`` or ``a, b``: each as it is written, or in quotes where it holds a comma."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    text = text.strip().removesuffix(",")
    values: list[Any] = []
    at = 0
    while at < len(text) and (match := _PART.match(text, at)):
        part, at = match[1], match.end()
        quoted = len(part) > 1 and part[0] == part[-1] and part[0] in "'\""
        values.append(part[1:-1].replace("''", "'") if quoted else Words(part))
    return values


def quoted(value: Any) -> str:
    """Show a value in a message: numbers and lists without quotes."""
    bare = isinstance(value, Words) and (_DECIMAL.fullmatch(value) or value[:1] in ("[", "{"))
    return short(value) if bare else shown(value)


def _plainly(text: str) -> str:
    """The decimal form of a number that was written in another."""
    try:
        number = int(text, 0) if re.fullmatch(r"[+-]?0[xXoObB]\w+|[0-9]+(_[0-9]+)+", text) else int(_whole(text))
    except (ValueError, OverflowError):
        return ""
    return f" (write {number})"


def _whole(text: str) -> float:
    number = float(text) if _DECIMAL.fullmatch(text) else math.nan
    if abs(number) >= 1e16 or not number.is_integer():
        raise ValueError
    return number
