"""Reading a model's own config.json strictly: fill in defaults, refuse what is not understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hypersd_jax.errors import UserError, shown

ACTIVATIONS = ("silu", "swish", "gelu", "relu", "mish")

LARGEST = 2**20
"""No width, vocabulary or side of an image of a real model comes near; beyond it a network is not even described."""

MOST_LAYERS = 512
"""Layers of one sort in one network, past which it takes seconds to describe; SDXL's UNet has 70 transformer layers."""

# What a parameter of the network can hold.
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)


def with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Complete `config` with `defaults`; UserError for a key that asks for something unknown.

    Keys that begin with an underscore are notes of the writing program, and unknown keys with null or false ask for
    nothing. `_class_name`, where given, must be `name`.
    """
    found = config.get("_class_name", name)
    if found != name:
        raise UserError(f"_class_name: expected {name}, found {shown(found)}")
    for key, value in config.items():
        if key not in defaults and not key.startswith("_") and value is not None and value is not False:
            raise UserError(f"{name} config: unknown key {key}={shown(value)}")
    return {key: config.get(key, default) for key, default in defaults.items()}


def require(values: Mapping[str, Any], name: str, allowed: Mapping[str, Sequence[Any]]) -> None:
    """Refuse, by key and value, whatever is not among the supported values of each key in `allowed`."""
    for key, options in allowed.items():
        value = values[key]
        if not any(value == option and type(value) is type(option) for option in options):
            only = " or ".join(map(repr, options))
            raise UserError(f"{name} config: {key}={shown(value)} is not supported, only {only}")


def natural(values: Mapping[str, Any], name: str, key: str, *, optional: bool = False) -> int:
    """Read a positive integer; with `optional`, null reads as 0."""
    value = values[key]
    if optional and value is None:
        return 0
    if not _fits(value, int, 1):
        raise UserError(f"{name} config: {key}={shown(value)} is not a positive integer up to {LARGEST}")
    return int(value)


def number(values: Mapping[str, Any], name: str, key: str, *, positive: bool = False) -> float:
    """Read a finite number, with `positive` one above 0."""
    value = values[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _FLOAT32_MAX:
        raise UserError(f"{name} config: {key}={shown(value)} is not a finite number")
    if positive and value < _FLOAT32_TINY:
        raise UserError(f"{name} config: {key}={shown(value)} is not positive")
    return float(value)


def nonempty(values: Mapping[str, Any], name: str, key: str) -> list[Any]:
    """Read a list that holds something."""
    value = values[key]
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{name} config: {key}={shown(value)} is not a list of one entry or more")
    return list(value)


def require_layers(name: str, key: str, count: int) -> None:
    """Refuse, by the key that asks for them, more than `MOST_LAYERS`."""
    if count > MOST_LAYERS:
        raise UserError(f"{name} config: {key} makes {count} layers, more than {MOST_LAYERS}")


def image_size(values: Mapping[str, Any], name: str, key: str) -> int | tuple[int, int]:
    """Read one side for square images or a list of height and width; null reads as 0."""
    value = values[key]
    if not isinstance(value, list | tuple):
        return natural(values, name, key, optional=True)
    height, width = per_block(values, name, key, 2)
    return height, width


def per_block(
    values: Mapping[str, Any], name: str, key: str, count: int, kind: type = int, *, least: int = 1
) -> tuple[Any, ...]:
    """Read one value for all blocks, or a list with one for each; integers must be from `least` to `LARGEST`."""
    value = values[key]
    require_layers(name, key, count)
    items = (value,) * count if isinstance(value, kind) else value
    if not isinstance(items, list | tuple) or not all(_fits(item, kind, least) for item in items):
        span = f" from {least} to {LARGEST}" if kind is int else ""
        raise UserError(f"{name} config: {key}={shown(value)} must be one {kind.__name__}{span} or a list of them")
    if len(items) != count:
        raise UserError(f"{name} config: {key}={shown(value)} needs {count} entries, one for each block")
    return tuple(items)


def _fits(item: Any, kind: type, least: int) -> bool:
    if kind is int:
        return isinstance(item, int) and not isinstance(item, bool) and least <= item <= LARGEST
    return isinstance(item, kind)
