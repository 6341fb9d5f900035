"""Results rows as text: Markdown, and aligned columns for a terminal."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypersd_jax.evaluation.columns import COLUMNS
from hypersd_jax.weights.tensors import replacing

ERROR_SUFFIX = "_se"
MISSING = "\N{EN DASH}"
# What a terminal shows after training; the files hold all.
COMPACT = ("model", "steps", "guidance", "calls", "distance", "margin", "clip_gain", "diversity", "seconds_per_image")
TERMINAL = 120
TERMINAL_HEADINGS = {"seconds_per_image": "s/image", "n": "images", "pickscore_100": "pickscore/100"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table beside that of the results: its heading, its rows, and what the reader must know about it."""

    heading: str
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()


def table_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns: the known ones in their order, then the rest; standard errors have none of their own."""
    present = dict.fromkeys(key for row in rows for key in row)
    errors = {key for key in present if key.endswith(ERROR_SUFFIX) and key.removesuffix(ERROR_SUFFIX) in present}
    known = [key for key, column in COLUMNS.items() if key in present and column.heading]
    return known + [key for key in present if key not in COLUMNS and key not in errors]


def table_heading(key: str) -> str:
    """Format the heading of a column, with an arrow to where it is better."""
    if key not in COLUMNS:
        return key.replace("_", " ")
    arrow = {"lower": "\N{NO-BREAK SPACE}↓", "higher": "\N{NO-BREAK SPACE}↑", None: ""}
    return COLUMNS[key].heading + arrow[COLUMNS[key].better]


def table_cell(row: Mapping[str, Any], key: str) -> str:
    """A value with its standard error, as plain text."""
    digits = COLUMNS[key].digits if key in COLUMNS else None
    text, error = number_text(row.get(key), digits), row.get(key + ERROR_SUFFIX)
    return f"{text} ± {number_text(error, digits)}" if is_number(error) else text


def steps_text(count: int) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count} step" + ("" if count == 1 else "s")


def is_number(value: Any) -> bool:
    """Tell whether a value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number_text(value: Any, digits: int | None) -> str:
    """A value as text, with so many digits after the point, or where there are none four in all."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, float):
        return f"{value:.4g}" if digits is None else f"{value:,.{digits}f}"
    return f"{value:,}" if is_number(value) else str(value)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row; ``KEY_se`` stands behind ``KEY``."""
    keys = table_keys(rows)
    lines = [[table_heading(key) for key in keys], ["---"] * len(keys)]
    lines += [[table_cell(row, key) for key in keys] for row in rows]
    return "".join(f"| {' | '.join(text.replace('|', '/') for text in line)} |\n" for line in lines)


def write_markdown(
    path: Path, title: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str], tables: Sequence[Table] = ()
) -> None:
    """Title, table and notes, and further tables below, atomically."""
    parts = [f"# {title}", markdown_table(rows).strip(), *notes]
    for table in tables:
        parts += [f"## {table.heading}", markdown_table(table.rows).strip(), *table.notes]
    with replacing(path) as temporary:
        text = "\n\n".join(parts)
        temporary.write_text(text + "\n", encoding="utf-8")


def plain_table(rows: Sequence[Mapping[str, Any]], *, keys: Sequence[str] | None = None, width: int = TERMINAL) -> str:
    """Aligned columns for a terminal, each line at most ``width`` wide; "" where there are no rows.

    Columns that do not fit beside one another follow in further blocks, each under the models' names.

    Args:
        rows: of results.json.
        keys: the columns, those of them that rows have; None: all.
        width: of a line, in characters.
    """
    present = table_keys(rows)
    shown = [key for key in (present if keys is None else keys) if key in present]
    columns = [_column(rows, key, most=width // 3) for key in shown]
    blocks: list[list[list[str]]] = []
    for column in columns:
        block = blocks[-1] if blocks else None
        if block is None or sum(_width(each[0]) + 2 for each in block) + _width(column[0]) > width:
            blocks.append([columns[0], column] if blocks else [column])
        else:
            block.append(column)
    lines = ("\n".join("  ".join(cells).rstrip() for cells in zip(*block, strict=True)) for block in blocks)
    return "".join(f"{text}\n" for text in "\n\n".join(lines).splitlines())


def _column(rows: Sequence[Mapping[str, Any]], key: str, most: int) -> list[str]:
    """Heading and cells, filled up to one width: numbers from the left, text from the right."""
    right = any(is_number(row.get(key)) for row in rows)
    heading = TERMINAL_HEADINGS.get(key, key.replace("_", " "))
    texts = [heading, *(_cut(" ".join(table_cell(row, key).split()), most) for row in rows)]
    width = max(map(_width, texts))
    return [" " * (width - _width(text)) + text if right else text + " " * (width - _width(text)) for text in texts]


def _cut(text: str, most: int) -> str:
    if _width(text) <= most:
        return text
    while _width(text) > most - 1:
        text = text[:-1]
    return text + "\N{HORIZONTAL ELLIPSIS}"


def _width(text: str) -> int:
    """Columns of a terminal: Chinese, Japanese and Korean letters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(bool(unicodedata.combining(letter)) for letter in text)
