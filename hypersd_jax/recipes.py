"""The recipes that ship with the package: YAML files of ``configs/``, by name."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError
from hypersd_jax.paths import expanded

# In a wheel the recipes lie inside the package; in a checkout beside it.
_PACKAGE = Path(__file__).parent
FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def recipe_files() -> dict[str, Path]:
    """List the shipped recipes by name: NAME of NAME.yaml, FOLDER/NAME of one in a folder."""
    folder = next((f for f in FOLDERS if f.is_dir()), FOLDERS[0])
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(found.items()))


def recipe_titles() -> dict[str, str]:
    """Say what each shipped recipe makes, by name: the first sentence of its header."""
    titles = {}
    for name, path in recipe_files().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        header = itertools.takewhile(lambda line: re.match(r"# \S", line), lines)  # commands stand further in
        titles[name] = re.split(r"(?<=\.)\s", " ".join(line[2:] for line in header), maxsplit=1)[0]
    return titles


def find_recipe(name: str) -> Path:
    """Find a recipe by its file's path or its name; an unknown one is a `UserError` with the nearest name."""
    path = expanded(Path(name))
    if os.path.isfile(path):
        return path
    known = recipe_files()
    asked = str(name).removesuffix(".yaml").removesuffix(".yml").removeprefix("./").removeprefix("configs/")
    if asked in known:
        return known[asked]
    if os.path.isdir(path):
        raise UserError(f"--config {name}: is a folder, expected a recipe's .yaml file")
    raise UserError(f"--config {name}: no such file{nearest(asked, known)}")
