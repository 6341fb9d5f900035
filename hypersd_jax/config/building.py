"""From plain data to frozen dataclasses, with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from hypersd_jax.errors import UserError

T = TypeVar("T")


def build(cls: type[T], value: Any, path: str = "") -> T:
    """Make the dataclass ``cls`` from plain data; errors carry the dotted ``path``."""
    where = path or "the configuration"
    if isinstance(value, str) and any(field.name == "source" for field in dataclasses.fields(cls)):  # type: ignore[arg-type]
        value = {"source": value}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping of keys, not {value!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in fields:
            raise UserError(f"unknown key {prefix}{key}{nearest(str(key), fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{prefix}{missing[0]} is missing")
    arguments = {key: _convert(hints[key], item, f"{prefix}{key}") for key, item in value.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint ``; did you mean 'x'?`` or the list of valid names."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; valid names are {', '.join(names)}"


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        # As in int | Literal["auto"].
        words = [argument for argument in inner if typing.get_origin(argument) is Literal]
        if words and len(inner) == 2:
            inner.remove(words[0])
            named = typing.get_args(words[0])
            if value in named:
                return value
            try:
                return _convert(inner[0], value, path)
            except UserError as error:
                raise UserError(f"{error}, nor {' or '.join(named)}") from None
        return _convert(inner[0] if len(inner) == 1 else _of_kind(inner, value, path), value, path)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{path}={value!r} is not valid{nearest(str(value), map(str, arguments))}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path} must be a list, not {value!r}")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise UserError(f"{path} must have {len(arguments)} values, not {len(value)}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(_convert(k, v, f"{path}.{i}") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)  # type: ignore[arg-type]
    return _convert_scalar(kind, value, path)


def _of_kind(classes: list[Any], value: Any, path: str) -> Any:
    """Which of several dataclasses ``value`` is for: the one whose ``kind`` it names, or the first."""
    kinds = {name: cls for cls in classes for name in typing.get_args(typing.get_type_hints(cls)["kind"])}
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind is None:
        return classes[0]
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{path}.kind={kind!r} is not valid{nearest(str(kind), kinds)}")
    return kinds[kind]


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 as a string
            number = float(value)
        except ValueError:
            number = float("nan")
        if number - number == 0.0:
            return number
        raise UserError(f"{path} must be a finite number, not {value!r}")
    if (kind is int and isinstance(value, int) and not isinstance(value, bool)) or (
        kind is not int and isinstance(value, kind)
    ):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise UserError(f"{path} must be {names.get(kind, kind)}, not {value!r}")
