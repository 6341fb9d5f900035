"""Results rows as a Markdown table, with the headings and digits of the report page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypersd_jax.evaluation.report import table_cell, table_heading, table_keys
from hypersd_jax.weights.tensors import replacing


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row; ``KEY_se`` stands behind ``KEY``."""
    keys = table_keys(rows)
    lines = [[table_heading(key) for key in keys], ["---"] * len(keys)]
    lines += [[table_cell(row, key) for key in keys] for row in rows]
    return "".join(f"| {' | '.join(text.replace('|', '/') for text in line)} |\n" for line in lines)


def write_markdown(path: Path, title: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    """Title, table and notes, atomically."""
    with replacing(path) as temporary:
        text = "\n\n".join([f"# {title}", markdown_table(rows).strip(), *notes])
        temporary.write_text(text + "\n", encoding="utf-8")
