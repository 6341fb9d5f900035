"""The recipes that ship with the package: YAML files of ``configs/``, by name."""

from __future__ import annotations

from pathlib import Path

from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError

# In a wheel the recipes lie inside the package; in a checkout beside it.
_PACKAGE = Path(__file__).parent
FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def recipe_files() -> dict[str, Path]:
    """The shipped recipes by name."""
    folder = next((f for f in FOLDERS if f.is_dir()), FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe by its file's path or its name; an unknown one is a `UserError` with the nearest name."""
    path = Path(name)
    if path.is_file():
        return path
    known = recipe_files()
    if path.stem in known and path.parent.name in ("", "configs"):
        return known[path.stem]
    raise UserError(f"--config {name}: no such file{nearest(path.stem, known)}")
