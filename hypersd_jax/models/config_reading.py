"""Reading a model's own config.json strictly: fill in defaults, refuse what is not understood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hypersd_jax.errors import UserError

ACTIVATIONS = ("silu", "swish", "gelu", "relu", "mish")


def with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Complete `config` with `defaults`; UserError for a key that asks for something unknown.

    Keys that begin with an underscore are notes of the writing program, and unknown keys with null or false ask for
    nothing. `_class_name`, where given, must be `name`.
    """
    found = config.get("_class_name", name)
    if found != name:
        raise UserError(f"_class_name: expected {name}, found {found!r}")
    for key, value in config.items():
        if key not in defaults and not key.startswith("_") and value is not None and value is not False:
            raise UserError(f"{name} config: unknown key {key}={value!r}")
    return {key: config.get(key, default) for key, default in defaults.items()}


def require(values: Mapping[str, Any], name: str, allowed: Mapping[str, Sequence[Any]]) -> None:
    """Refuse, by key and value, whatever is not among the supported values of each key in `allowed`."""
    for key, options in allowed.items():
        value = values[key]
        if not any(value == option and type(value) is type(option) for option in options):
            raise UserError(f"{name} config: {key}={value!r} is not supported, only {' or '.join(map(repr, options))}")


def natural(values: Mapping[str, Any], name: str, key: str, *, optional: bool = False) -> int:
    """Read a positive integer; with `optional`, null reads as 0."""
    value = values[key]
    if optional and value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} config: {key}={value!r} is not a positive integer")
    return value


def number(values: Mapping[str, Any], name: str, key: str, *, positive: bool = False) -> float:
    """Read a finite number, with `positive` one above 0."""
    value = values[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{name} config: {key}={value!r} is not a finite number")
    if positive and value <= 0:
        raise UserError(f"{name} config: {key}={value!r} is not positive")
    return float(value)


def nonempty(values: Mapping[str, Any], name: str, key: str) -> list[Any]:
    """Read a list that holds something."""
    value = values[key]
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{name} config: {key}={value!r} is not a list of one entry or more")
    return list(value)


def image_size(values: Mapping[str, Any], name: str, key: str) -> int | tuple[int, int]:
    """Read one side for square pictures or a list of height and width; null reads as 0."""
    value = values[key]
    if not isinstance(value, list | tuple):
        return natural(values, name, key, optional=True)
    height, width = per_block(values, name, key, 2)
    return height, width


def per_block(
    values: Mapping[str, Any], name: str, key: str, count: int, kind: type = int, *, least: int = 1
) -> tuple[Any, ...]:
    """Read one value for all blocks, or a list with one for each of `count`; integers must be `least` or more."""
    value = values[key]
    items = (value,) * count if isinstance(value, kind) else value
    if not isinstance(items, list | tuple) or not all(_fits(item, kind, least) for item in items):
        raise UserError(f"{name} config: {key}={value!r} must be one {kind.__name__} or a list of them")
    if len(items) != count:
        raise UserError(f"{name} config: {key}={value!r} needs {count} entries, one for each block")
    return tuple(items)


def _fits(item: Any, kind: type, least: int) -> bool:
    if kind is int:
        return isinstance(item, int) and not isinstance(item, bool) and item >= least
    return isinstance(item, kind)
