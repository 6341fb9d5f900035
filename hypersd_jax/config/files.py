"""YAML plus ``key.path=value`` overrides into a configuration, and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hypersd_jax.config.building import build
from hypersd_jax.config.hints import nearest
from hypersd_jax.config.overrides import apply_overrides
from hypersd_jax.config.schema import Config
from hypersd_jax.config.tree import TreeError, read_tree
from hypersd_jax.errors import UserError
from hypersd_jax.paths import expanded


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML recipe and apply ``key.path=value`` overrides.

    List entries are addressed by index, ``stages.0.updates=10``, by name, ``stages.tscd-8.updates=10``, or all at
    once, ``stages.*.batch_size=4``. A value is read as its key's type asks: text stays as it is written, numbers are
    decimal. Raises `UserError` with one line that names the file or key.
    """
    tree = _read_recipe(expanded(Path(path)))
    apply_overrides(tree, overrides, Config)
    return build(Config, tree)


def load_run(folder: Path) -> Config:
    """Read the configuration that a run recorded in its output folder; UserError where it holds none."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder}: is not a run's folder (config.yaml is missing)")
    try:
        return load_config(file)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists, ready for YAML or JSON."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically; `load_config` reads it back to an equal one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    temporary.replace(path)


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> str | None:
    """The dotted key of the first value in which two plain configurations differ, with both values."""
    for key in dict.fromkeys([*a, *b]):
        left, right, where = a.get(key), b.get(key), f"{path}{key}"
        if isinstance(left, dict) and isinstance(right, dict):
            found = first_difference(left, right, f"{where}.")
            if found:
                return found
        elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            found = first_difference(_by_index(left), _by_index(right), f"{where}.")
            if found:
                return found
        elif left != right:
            return f"{where} ({left!r} against {right!r})"
    return None


def _by_index(items: list[Any]) -> dict[str, Any]:
    return {str(index): item for index, item in enumerate(items)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        known = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file" + (nearest(path.stem, known) if known else "")) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        tree = read_tree(text)
    except TreeError as error:
        line = f", line {error.line}" if error.line else ""
        raise UserError(f"{path}{line}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold a mapping of keys")
    return tree
