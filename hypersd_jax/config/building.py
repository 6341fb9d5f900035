"""From plain data to frozen dataclasses, with errors that name the key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from hypersd_jax.config.hints import key_hint, nearest
from hypersd_jax.config.kinds import kinds as kinds_of
from hypersd_jax.config.resolved import resolved
from hypersd_jax.config.scalars import Words, is_null, quoted, split_list, to_bool, to_float, to_int, to_text
from hypersd_jax.config.tree import TreeError, read_tree
from hypersd_jax.errors import UserError

T = TypeVar("T")

PATH = "path"
PathText = Annotated[str, PATH]
"""Text that names a file or folder, whose bytes need not be UTF-8."""


def build(cls: type[T], value: Any, path: str = "", root: type | None = None) -> T:
    """Make a dataclass from plain data.

    Args:
        cls: the dataclass.
        value: a mapping of its keys. Values of type `Words` are read as their field's type asks.
        path: the dotted key that it stands at, which errors carry.
        root: the dataclass of the configuration, in which misplaced keys are looked up; None is ``cls``.

    Raises:
        UserError: naming the key that is unknown, missing or bad.
    """
    root = root or cls
    where = path or "the configuration"
    if isinstance(value, str) and has_source(cls) and not is_flow_mapping(value):
        value = {"source": value}
    if isinstance(value, Words):
        value = opened(value, where)
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping of keys, not {quoted(value)}")
    hints = resolved(cls)  # type: ignore[arg-type]
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in fields:
            raise UserError(f"unknown key {prefix}{key}{key_hint(root, f'{prefix}{key}', list(fields))}")
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{prefix}{missing[0]} is missing")
    arguments = {key: _convert(hints[key], item, f"{prefix}{key}", root) for key, item in value.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None


def has_source(cls: Any) -> bool:
    """Tell whether a dataclass may be given as text alone, which is its ``source``."""
    return any(field.name == "source" for field in dataclasses.fields(cls))


def is_flow_mapping(text: str) -> bool:
    """Tell whether the words are ``{key: value, ...}``; a path such as ``{a}`` or ``{a,b}/x`` is not."""
    if not isinstance(text, Words) or not text.lstrip().startswith("{"):
        return False
    try:
        found = opened(text, "")
    except UserError:
        return False
    return isinstance(found, dict) and all(not isinstance(item, Words) or item for item in found.values())


def opened(words: Words, path: str) -> Any:
    """Read the mapping or list that words spell out in YAML; the words themselves where they are a single value.

    Raises:
        UserError: they are no YAML; names ``path``.
    """
    try:
        found = read_tree(words)
    except TreeError as error:
        raise UserError(f"{path}: {error}") from None
    return found if isinstance(found, dict | list) else words


def _convert(kind: Any, value: Any, path: str, root: type, *, optional: bool = False) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if type(None) in arguments and is_null(value):
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        # As in int | Literal["auto"].
        words = [argument for argument in inner if typing.get_origin(argument) is Literal]
        if words and len(inner) == 2:
            inner.remove(words[0])
            named = typing.get_args(words[0])
            if value in named:
                return str(value)
            try:
                return _convert(inner[0], value, path, root)
            except UserError as error:
                raise UserError(f"{error}, nor {' or '.join(named)}") from None
        return _convert(inner[0], value, path, root, optional=type(None) in arguments)
    if origin is Literal:
        for choice in arguments:
            if value == choice:
                return choice
        raise UserError(f"{path}={value!r} is not valid{nearest(str(value), map(str, arguments))}")
    if origin is tuple:
        return _convert_list(arguments, value, path, root)
    if dataclasses.is_dataclass(kind):
        if classes := kinds_of(kind):  # type: ignore[arg-type]
            kind, value = _of_kind(classes, value, path)
        return build(kind, value, path, root)
    if kind is str or origin is Annotated:
        return to_text(value, path, is_path=PATH in arguments, optional=optional)
    converters: dict[Any, Any] = {bool: to_bool, int: to_int, float: to_float}
    if kind in converters:
        return converters[kind](value, path)
    if isinstance(value, kind):
        return value
    raise UserError(f"{path} must be {kind}, not {quoted(value)}")


def _convert_list(kinds: tuple[Any, ...], value: Any, path: str, root: type) -> tuple[Any, ...]:
    """A tuple, of one kind and any length (``kinds`` ends in an ellipsis) or with a kind for each value."""
    endless = kinds[-1] is Ellipsis
    structured = any(dataclasses.is_dataclass(each) for each in (kinds[0], *typing.get_args(kinds[0])))
    found = opened(value, path) if isinstance(value, Words) and structured else value
    if isinstance(value, Words) and not structured and (value if endless else {"[", ","} & set(value)):
        found = split_list(value)
    if not isinstance(found, list | tuple):
        raise UserError(f"{path} must be a list, not {quoted(value)}")
    if not endless and len(found) != len(kinds):
        raise UserError(f"{path} must have {len(kinds)} values, not {len(found)}")
    each = [kinds[0]] * len(found) if endless else list(kinds)
    return tuple(_convert(k, v, f"{path}.{i}", root) for i, (k, v) in enumerate(zip(each, found, strict=True)))


def _of_kind(named: Mapping[str, type], value: Any, path: str) -> tuple[type, Any]:
    """The dataclass that ``value`` is for, by the ``kind`` that it names or by the first; and its mapping."""
    if isinstance(value, Words):
        value = opened(value, path)
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind is None:
        return next(iter(named.values())), value
    if not isinstance(kind, str) or kind not in named:
        raise UserError(f"{path}.kind={kind!r} is not valid{nearest(str(kind), named)}")
    return named[kind], value
