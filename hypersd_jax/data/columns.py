"""The columns of a table that hold image and caption, and the contents of their cells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from hypersd_jax.errors import UserError
from hypersd_jax.files import IMAGE_ENDINGS, decoded

Kind = Literal["image", "caption"]

IMAGE = "image"
_FIRST = ("jpg", "jpeg", "png", "webp")
ENDING_COLUMNS = (*_FIRST, *(ending[1:] for ending in IMAGE_ENDINGS if ending[1:] not in _FIRST))
"""The columns of images that are called as the files in a tar file end."""

# The usual names, in the order they are looked for; a dot goes into a nested column.
NAMES: dict[Kind, tuple[str, ...]] = {
    "image": (IMAGE, *ENDING_COLUMNS, "file_name", "image.path"),
    "caption": ("text", "caption", "txt", "prompt", "json.caption", "json.text", "json.prompt"),
}


def find_column(features: Mapping[str, Any], given: str | None, kind: Kind, source: str) -> str:
    """Find the column of a kind: the one that the configuration names, or the first of the usual names.

    Args:
        features: of the table, by column.
        given: the configuration's name, or None.
        kind: what is looked for; ``data.image_column`` or ``data.caption_column`` names it.
        source: for the message.

    Raises:
        UserError: there is none, with the columns there are.
    """
    for name in (given,) if given else NAMES[kind]:
        if _has(features, name):
            return name
        if kind == "image" and name in ENDING_COLUMNS and IMAGE in features:
            return IMAGE  # a tar's images, whatever they end in
    columns = ", ".join(features)
    if given:
        raise UserError(f"data.{kind}_column: {source} has no column {given!r}; it has {columns}")
    usual = ", ".join((IMAGE, *_FIRST, "file_name") if kind == "image" else NAMES[kind])
    raise UserError(
        f"data.source: {source} has no {kind}s: none of its columns ({columns}) is called {usual}; "
        f"name one with data.{kind}_column"
    )


def _has(features: Mapping[str, Any], name: str) -> bool:
    """Tell whether a dotted name addresses a column; types without named parts, such as JSON, may hold anything."""
    if name in features:
        return True
    head, dot, rest = name.partition(".")
    if not dot or head not in features:
        return False
    inner = features[head]
    return _has(inner, rest) if isinstance(inner, Mapping) else type(inner).__name__ == "Json"


def column_of(features: Mapping[str, Any], name: str) -> str:
    """Return the outermost column of a dotted name."""
    return name if name in features else name.partition(".")[0]


def _cell(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    head, dot, rest = name.partition(".")
    inner = row.get(head)
    if isinstance(inner, bytes):  # JSON as it lies in a tar file
        inner = json_cell(inner)
    return _cell(inner, rest) if dot and isinstance(inner, Mapping) else None


def json_cell(data: bytes) -> Any:
    """Parse a JSON file of a sample, whose numbers stay the text that they are.

    Raises:
        ValueError: it is not UTF-8, or not JSON.
    """
    try:
        return json.loads(decoded(data), parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError:
        raise ValueError("not valid JSON") from None


def caption_text(row: Mapping[str, Any], name: str) -> str:
    """Read a row's caption on one line, ``""`` if there is none; of a list of captions the first.

    Raises:
        ValueError: its bytes are not UTF-8 text.
    """
    value = _cell(row, name)
    if isinstance(value, list):
        value = next((each for each in value if each), None)
    if isinstance(value, bytes):
        value = decoded(value)
    return "" if value is None else " ".join(str(value).split())


def image_cell(row: Mapping[str, Any], name: str) -> bytes | str:
    """Return a row's encoded image, or the path or URL where it is.

    Raises:
        ValueError: the cell is empty or something else.
    """
    value = _cell(row, name)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not value:
        raise ValueError("no image")
    if not isinstance(value, bytes | str):
        raise ValueError(f"a {type(value).__name__}, neither bytes nor a path")
    return value
