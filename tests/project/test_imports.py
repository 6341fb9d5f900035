"""What scripts, examples and benchmarks import of the package exists: most of them are run by hand alone."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for room in ("scripts", "examples", "benchmarks") for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_it_imports_of_the_package_exists(path: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("hypersd_jax", "benchmarks"):
            try:
                module = importlib.import_module(str(node.module))
            except ModuleNotFoundError as error:
                if str(error.name).split(".")[0] in ("hypersd_jax", "benchmarks"):
                    raise
                pytest.skip(f"{node.module} needs {error.name}")  # PyTorch, where the suite runs without
            for alias in node.names:
                if not hasattr(module, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ImportError:
                        missing.append(f"{node.module}.{alias.name}, line {node.lineno}")
    assert not missing
