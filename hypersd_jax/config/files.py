"""YAML plus ``key.path=value`` overrides into a configuration, and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hypersd_jax.config.building import build, nearest
from hypersd_jax.config.schema import Config
from hypersd_jax.errors import UserError


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML recipe and apply ``key.path=value`` overrides.

    List entries are addressed by index, ``stages.0.updates=10``, by name, ``stages.tscd-8.updates=10``, or all at
    once, ``stages.*.batch_size=4``. Raises `UserError` with one line that names the file or key.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return build(Config, tree)


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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file" + (nearest(path.stem, known) if known else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{line}: not valid YAML") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold a mapping of keys")
    # Anchors make several keys one object, which an override of one would change for all.
    return typing.cast(dict[str, Any], _plain(tree))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must look like key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {key}: {text!r} is not a valid value") from None
    _set(tree, key.split("."), value, key)


def _set(node: Any, parts: list[str], value: Any, key: str) -> None:
    head, rest = parts[0], parts[1:]
    if isinstance(node, list):
        for index in _list_indices(node, head, key):
            if rest:
                _set(node[index], rest, value, key)
            else:
                node[index] = value
    elif isinstance(node, dict):
        if not rest:
            old = node.get(head)
            if isinstance(value, str) and isinstance(old, dict) and "source" in old:  # `model=PATH`: the rest stays
                value = {**old, "source": value}
            node[head] = value
        else:
            child = node.get(head)
            if child is None:
                child = {}
            elif isinstance(child, str):  # the short form, `model: PATH`
                child = {"source": child}
            node[head] = child
            _set(child, rest, value, key)
    else:
        raise UserError(f"override {key}: {head} cannot be set inside {node!r}")


def _list_indices(items: list[Any], head: str, key: str) -> list[int]:
    if head == "*":
        return list(range(len(items)))
    if head.lstrip("-").isdigit() and -len(items) <= int(head) < len(items):
        return [int(head)]
    named = [i for i, item in enumerate(items) if isinstance(item, dict) and item.get("name") == head]
    if named:
        return named
    names = [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(items)]
    raise UserError(f"override {key}: no entry {head!r}{nearest(head, names)}")
