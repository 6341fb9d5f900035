"""docs/method.md: its functions exist, and so do its configuration keys."""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypersd_jax.config import Config, kinds

PAGE = Path(__file__).parents[2] / "docs" / "method.md"
CODE = re.compile(r"`([^`]+)`")
# Values that stand in the column by themselves, beside another of their key.
VALUES = {"all", "pair"}


def rows() -> list[list[str]]:
    """The cells of all rows of the page's tables, without their headers."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == 3 and row[1] != "function" and set(row[0]) != {"-"}]


def exists(name: str) -> bool:
    """Whether `a.b.c` of hypersd_jax can be imported, or is an attribute of what can."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(("hypersd_jax", *parts[:count])))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)  # type: ignore[assignment]
        return found is not None
    return False


def key_paths(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted paths of all keys below a type, without the indices of lists."""
    if dataclasses.is_dataclass(kind):
        for cls in kinds(kind).values() or [kind]:  # type: ignore[arg-type]
            hints = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                yield f"{prefix}{field.name}"
                yield from key_paths(hints[field.name], f"{prefix}{field.name}.")
    for inner in typing.get_args(kind):
        yield from key_paths(inner, prefix)


def test_the_page_has_tables() -> None:
    assert len(rows()) > 40
    assert all(re.fullmatch(r"(`[^`]+`(, | of )?)+", row[1]) for row in rows())


@pytest.mark.parametrize("name", sorted({name for row in rows() for name in CODE.findall(row[1])}))
def test_its_functions_exist(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize(
    "key",
    sorted(
        {text.partition(":")[0] for row in rows() for text in CODE.findall(row[2])} - VALUES - {"scheduler_config.json"}
    ),
)
def test_its_keys_exist(key: str) -> None:
    assert any(f".{path}".endswith(f".{key}") for path in key_paths(Config))
