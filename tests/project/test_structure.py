"""The house's order: which room may import which, how long a file may be, what no file says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hypersd_jax

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hypersd_jax"

# From the ground up: a room imports only what stands before it.
ROOMS = (
    "lazy",
    "errors",
    "paths",
    "progress",
    "files",
    "compilation",
    "config",
    "recipes",
    "diffusion",
    "adapters",
    "models",
    "weights",
    "conditioning",
    "rewards",
    "distill",
    "presets",
    "bases",
    "pipeline",
    "png_text",
    "sampling_command",
    "interop",
    "data",
    "training",
    "inputs",
    "evaluation",
    "benchmarking",
    "stages",
    "machine",
    "inspection",
    "publishing",
    "planning",
    "serving",
    "commands",
    "cli",
    "__main__",
)
# Rooms that see less than everything before them.
ONLY = {
    "lazy": set(),
    "errors": set(),
    "paths": {"errors"},
    "progress": set(),
    "files": set(),
    "compilation": {"errors", "paths"},
    "diffusion": {"lazy", "errors"},
    "adapters": {"errors"},
    "distill": {"errors", "diffusion"},
}
MAX_LINES = 450
MODULES = sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """`models/unet.py` is in models; the package's own `__init__` is in no room and sees them all."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute module of every import of ours, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            found = [f"{base}.{alias.name}" for alias in node.names] if base == "hypersd_jax" else [base]
        else:
            continue
        yield from ((node.lineno, module) for module in found if module.split(".")[0] == "hypersd_jax")


def violation(room: str, module: str) -> str | None:
    """Why this room may not import this module, or None."""
    parts = module.split(".")
    if len(parts) == 1:
        return "imports the whole package"
    target = parts[1]
    if target == room:
        return None
    if target not in ROOMS:
        return f"imports {module}, which is in no known room"
    if ROOMS.index(target) > ROOMS.index(room):
        return f"imports {module}, which stands above it"
    if target not in ONLY.get(room, {target}):
        return f"imports {module}, but {room} may import only {sorted(ONLY[room]) or 'nothing'}"
    return None


def test_every_module_is_in_a_known_room():
    unknown = {room_of(path) for path in MODULES} - set(ROOMS) - {"__init__"}
    assert not unknown, f"add to ROOMS, at its height: {sorted(unknown)}"


def test_rooms_import_only_what_stands_before_them():
    wrong = []
    for path in MODULES:
        room = room_of(path)
        if room not in ROOMS:  # the package's own `__init__`, or one that the test above names
            continue
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for line, module in imports(path.read_text(encoding="utf-8"), package):
            if reason := violation(room, module):
                wrong.append(f"{name(path)}:{line} {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("models/unet.py", "from hypersd_jax.weights import keys", "stands above"),
        ("models/unet.py", "def f():\n    import hypersd_jax.cli", "stands above"),
        ("models/unet.py", "from hypersd_jax import stages", "stands above"),
        ("models/unet.py", "from ..training.mesh import make_mesh", "stands above"),
        ("models/unet.py", "import hypersd_jax", "whole package"),
        ("models/unet.py", "from hypersd_jax.tools import x", "no known room"),
        ("distill/tscd.py", "from hypersd_jax.adapters import merge", "may import only"),
        ("adapters/lora.py", "from hypersd_jax.diffusion import schedule", "may import only"),
        ("models/unet.py", "from . import layers\nfrom hypersd_jax.adapters import attach", None),
        ("cli.py", "from . import training", None),
        ("stages/tscd.py", "import jax\nfrom hypersd_jax.distill import tscd", None),
    ],
)
def test_the_checker_itself(path, source, reason):
    package = ".".join(("hypersd_jax", *Path(path).parent.parts))
    found = [violation(room_of(PACKAGE / path), module) for _, module in imports(source, package)]
    assert [text for text in found if text] == [] if reason is None else all(reason in text for text in found)
    assert reason is None or found


def test_files_stay_short():
    files = [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {file: lines for file, lines in lengths.items() if lines >= MAX_LINES}
    assert not long, f"one idea a file, under {MAX_LINES} lines: {long}"


def test_what_the_library_does_not_use():
    """pmap, which one benchmark compares, NNX's own transforms (pytrees go to jax.jit), and flags of the process."""
    compared = "hypersd_jax/benchmarking/apis.py", "jax.pmap"
    banned = re.compile(r"\bjax\.pmap\b|\bnnx\.(jit|grad|value_and_grad|pmap|scan|remat)\b|XLA_FLAGS")
    found = [
        f"{name(path)}:{number} {hit.group()}"
        for path in MODULES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (hit := banned.search(line)) and (name(path), hit.group()) != compared
    ]
    assert not found, "\n".join(found)


def test_no_file_holds_leftovers():
    """No unfinished work, and no path of one machine."""
    marks = ["TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK"]
    leftover = re.compile(rf"\b({'|'.join(marks)})\b|(?<![\w.~])/(home|root|work|Users)/\w")
    files = [*MODULES]
    for pattern in (
        "*.py",
        "*.md",
        "*.toml",
        "tests/**/*.py",
        "docs/**/*.md",
        "configs/**/*.yaml",
        "benchmarks/**/*.py",
        "examples/**/*.ipynb",
    ):
        files += sorted(ROOT.glob(pattern))
    found = [
        f"{name(path)}:{number} {hit.group()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (hit := leftover.search(line))
    ]
    assert not found, "\n".join(found)


def test_lazy_names_are_listed_and_there():
    assert dir(hypersd_jax) == sorted(hypersd_jax.__all__)
    assert all(getattr(hypersd_jax, name) is not None for name in dir(hypersd_jax))
