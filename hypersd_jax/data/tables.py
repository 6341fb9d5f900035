"""Tables that people write by hand - csv, JSON lines, JSON, plain lines - read so that text stays as it is written."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hypersd_jax.data.listing import file_name, open_file, reason
from hypersd_jax.errors import UserError, short
from hypersd_jax.files import decoded, lines_of

TEXT_TABLES = (".csv", ".jsonl", ".json", ".txt")
LINES_COLUMN = "text"

Columns = dict[str, list[str | None]]
"""Cells by column, all text: `007`, `1e5` and `2024-01-05` stay as they are written. None is an absent cell."""


def read_table(file: str) -> Columns:
    """Read a text table; nested JSON objects become columns with dots, of a list the first item counts.

    Args:
        file: a path or URL that ends in one of `TEXT_TABLES`; a ``.txt`` is a column ``text``, one prompt a line.

    Raises:
        UserError: naming the file, and the line where it goes wrong.
    """
    try:
        with open_file(file) as opened:
            data = opened.read()
    except Exception as error:  # every file system has its own kinds
        raise UserError(f"data.source: {file} cannot be read ({reason(error)})") from None
    try:
        return _in_columns(_rows(decoded(data), file_name(file).rpartition(".")[2].lower()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.source: {file} cannot be read: {short(error)}") from None


def join_tables(tables: Iterable[Columns]) -> Columns:
    """Put tables under one another; a column that one of them lacks is absent there."""
    joined: Columns = {}
    count = 0
    for table in tables:
        rows = len(next(iter(table.values()), []))
        for name in table.keys() - joined.keys():
            joined[name] = [None] * count
        for name, cells in joined.items():
            cells.extend(table.get(name, [None] * rows))
        count += rows
    return joined


def _rows(text: str, kind: str) -> Iterable[Mapping[str, str | None]]:
    if kind == "csv":
        return _csv_rows(text)
    if kind == "txt":
        return ({LINES_COLUMN: line} for line in lines_of(text))
    return _json_rows(text, lines=kind == "jsonl")


def _csv_rows(text: str) -> Iterator[dict[str, str | None]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    try:
        for row in reader:
            if header is None:
                header = [name.strip() for name in row]
                if twice := next((name for name in header if header.count(name) > 1), None):
                    raise ValueError(f"its header has {twice!r} twice")
            elif row:
                if len(row) != len(header):
                    fields = f"line {reader.line_num} has {len(row)} fields, the header {len(header)}"
                    raise ValueError(f"{fields}; put quotes around text with commas")
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _json_rows(text: str, *, lines: bool) -> Iterator[dict[str, str | None]]:
    found: Iterable[tuple[str, Any]]
    if not lines:
        try:
            document = _parsed(text)
        except ValueError:
            lines = True  # a .json that holds JSON lines
        else:
            lists = isinstance(document, dict) and document and all(isinstance(x, list) for x in document.values())
            records = _transposed(document) if lists else document if isinstance(document, list) else [document]
            found = ((f"record {number}", record) for number, record in enumerate(records, start=1))
    if lines:
        found = (
            (f"line {number}", _parsed(line, f"line {number}"))
            for number, line in enumerate(lines_of(text), start=1)
            if line.strip()
        )
    for where, record in found:
        if not isinstance(record, dict):
            raise ValueError(f"{where} is not an object with columns")
        row: dict[str, str | None] = {}
        _flatten(record, "", row)
        yield row


def _parsed(text: str, where: str = "") -> Any:
    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        at = where or f"line {error.lineno}"
        raise ValueError(f"{at} is not valid JSON ({error.msg})") from None


def _transposed(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    lengths = {len(cells) for cells in columns.values()}
    if len(lengths) > 1:
        raise ValueError("its columns have different lengths")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _flatten(record: Mapping[str, Any], before: str, row: dict[str, str | None]) -> None:
    for key, value in record.items():
        if isinstance(value, list):
            value = next((each for each in value if each), None)
        if isinstance(value, dict):
            _flatten(value, f"{before}{key}.", row)
        else:
            row[before + key] = value if value is None or isinstance(value, str) else json.dumps(value)


def _in_columns(rows: Iterable[Mapping[str, str | None]]) -> Columns:
    columns: Columns = {}
    count = 0
    for count, row in enumerate(rows, start=1):
        for name in row.keys() - columns.keys():
            columns[name] = [None] * (count - 1)
        for name, cells in columns.items():
            cells.append(row.get(name))
    return columns
