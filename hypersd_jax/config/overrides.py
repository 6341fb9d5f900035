"""``key.path=value`` onto the plain data of a recipe."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hypersd_jax.config.building import has_source, is_flow_mapping, opened
from hypersd_jax.config.hints import key_paths, nearest
from hypersd_jax.config.scalars import Words
from hypersd_jax.errors import UserError, shown


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str], root: type) -> None:
    """Put values in place of those of ``tree``, in order: of two for one key the last counts.

    Args:
        tree: plain data, which is changed.
        overrides: ``key.path=value`` each; the value is taken as `Words`.
        root: the dataclass that the tree is for.

    Raises:
        UserError: naming the override.
    """
    for name, kind in typing.get_type_hints(root).items():
        # `model: PATH` is short for its source.
        if dataclasses.is_dataclass(kind) and has_source(kind) and isinstance(tree.get(name), str):
            tree[name] = {"source": tree[name]}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} must look like key.path=value{_remedy(override, root)}")
        words = Words(text)
        kind = typing.get_type_hints(root).get(key)
        if dataclasses.is_dataclass(kind) and has_source(kind) and not is_flow_mapping(words):
            key += ".source"  # `model=PATH`: the rest stays
        _set(tree, key.split("."), words, key)


def _remedy(override: str, root: type) -> str:
    if Path(override).suffix.lower() in (".yaml", ".yml"):
        return f"; a recipe is given as --config {override}"
    keys = key_paths(root, override)
    return f"; did you mean {keys[0]}=VALUE, without spaces?" if keys else ""


def _set(node: Any, parts: list[str], value: Words, key: str) -> None:
    head, rest = parts[0], parts[1:]
    if isinstance(node, list):
        node[:] = [opened(item, key) if isinstance(item, Words) else item for item in node]
        entries: list[Any] = list(_list_indices(node, head, key))
    elif isinstance(node, dict):
        entries = [head]
    else:
        raise UserError(f"override {key}: {head} cannot be set inside {shown(node)}")
    for entry in entries:
        if not rest:
            node[entry] = value
            continue
        child = node.get(entry) if isinstance(node, dict) else node[entry]
        child = opened(child, key) if isinstance(child, Words) else child
        node[entry] = {} if child is None or (isinstance(child, Words) and not child) else child
        _set(node[entry], rest, value, key)


def _list_indices(items: list[Any], head: str, key: str) -> list[int]:
    """The entries that ``head`` addresses: ``*`` all, else by name or by index."""
    if head == "*":
        return list(range(len(items)))
    named = [i for i, item in enumerate(items) if isinstance(item, dict) and item.get("name") == head]
    digits = head.removeprefix("-")
    counted = digits.isascii() and digits.isdigit() and -len(items) <= int(head) < len(items)
    indices = [int(head) % len(items)] if counted else []
    if named and indices and named != indices:
        raise UserError(f"override {key}: {head} is the name of entry {named[0]} and the index of another")
    if named or indices:
        return named or indices
    names = [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(items)]
    raise UserError(f"override {key}: no entry {head!r}{nearest(head, names)}")
