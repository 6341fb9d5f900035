"""The recipes that ship with the package: YAML files of ``configs/``, by name."""

from __future__ import annotations

from pathlib import Path

from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError

# In a wheel the recipes lie inside the package; in a checkout beside it.
_PACKAGE = Path(__file__).parent
FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def recipe_files() -> dict[str, Path]:
    """The shipped recipes by name: NAME of NAME.yaml, FOLDER/NAME of one in a folder."""
    folder = next((f for f in FOLDERS if f.is_dir()), FOLDERS[0])
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe by its file's path or its name; an unknown one is a `UserError` with the nearest name."""
    path = Path(name)
    if path.is_file():
        return path
    known = recipe_files()
    asked = path.with_suffix("").as_posix().removeprefix("configs/")
    if asked in known:
        return known[asked]
    raise UserError(f"--config {name}: no such file{nearest(asked, known)}")
