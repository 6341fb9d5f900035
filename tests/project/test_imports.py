"""What scripts, examples and benchmarks import of the package exists: most of them are run by hand alone."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

OURS = ("hypersd_jax", "benchmarks")
ROOT = Path(__file__).parents[2]
FILES = sorted(path for room in ("scripts", "examples", "benchmarks") for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_it_imports_of_the_package_exists(path: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            module = imported(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name) and imported(f"{node.module}.{alias.name}", must=False) is None:
                    missing.append(f"{node.module}.{alias.name}, line {node.lineno}")
    assert not missing


def imported(name: str, *, must: bool = True) -> ModuleType | None:
    """A module, or None where there is none; the test is skipped where it needs a package that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] not in OURS:
            pytest.skip(f"{name} needs {error.name}")  # PyTorch, where the suite runs without
        if must:
            raise
        return None
