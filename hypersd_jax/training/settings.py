"""A stage's frozen dataclass as the argument of the compiled step: numbers are leaves, choices are static.

`jit` itself then shares one program between stages of equal choices, whatever their numbers.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Protocol

import jax
import numpy as np

from hypersd_jax.config.fields import OUTSIDE, ROLE, STATIC, derived

NUMBERS = {int: np.int32, float: np.float32}
_REGISTERED: set[type] = set()


class Settings(Protocol):
    """Settings that the engine reads: AdamW's settings (`optimizer`), the average's decay, the micro-batches."""

    @property
    def updates(self) -> Any:
        """Training steps of the stage."""

    @property
    def warmup(self) -> Any:
        """Training steps over which the learning rate rises."""

    @property
    def schedule(self) -> str:
        """The learning rate after the warm-up: constant, cosine or linear."""

    @property
    def beta1(self) -> float:
        """Decay of the first moment."""

    @property
    def beta2(self) -> float:
        """Decay of the second moment."""

    @property
    def weight_decay(self) -> float:
        """Decoupled weight decay, times the learning rate."""

    @property
    def clip_norm(self) -> float:
        """Largest global norm of a gradient."""

    @property
    def ema(self) -> Any:
        """Decay of the weights' moving average; 0 keeps it equal to them."""

    @property
    def accumulate(self) -> int:
        """Micro-batches of a training step."""


def step_argument(cls: type) -> type:
    """Register a dataclass of settings as a pytree, for what `config.fields` says of it.

    Inside the step its numbers are arrays, int32 or float32, a list of them one array; what is `outside` is not there.
    Dataclasses within it are registered with it.
    """
    leaves, choices = _parts(cls)

    def flatten(settings: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        numbers = tuple(_array(getattr(settings, name), kind) for name, kind in leaves.items())
        return numbers, tuple(getattr(settings, name) for name in choices)

    def unflatten(found: tuple[Any, ...], numbers: Any) -> Any:
        settings: Any = object.__new__(cls)  # its checks are of Python's numbers, and have been made
        settings.__dict__.update(zip((*leaves, *choices), (*numbers, *found), strict=True))
        return settings

    if cls not in _REGISTERED:
        _REGISTERED.add(cls)
        jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


def _parts(cls: type) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields that are leaves, with their NumPy type (None: a dataclass of its own), and those that are choices."""
    hints = typing.get_type_hints(cls)
    leaves: dict[str, Any] = {}
    choices: list[str] = []
    for field in dataclasses.fields(cls):
        kinds = set(_kinds(hints[field.name]))
        role = field.metadata.get(ROLE)
        if role == OUTSIDE:
            for base in cls.__mro__:  # its default is an attribute of the class, and would pass for the setting inside
                if field.name in vars(base):
                    delattr(base, field.name)
            continue
        if role != STATIC and any(dataclasses.is_dataclass(kind) for kind in kinds):
            leaves[field.name] = None
            for kind in kinds:
                if dataclasses.is_dataclass(kind):
                    step_argument(kind)  # type: ignore[arg-type]
        elif role != STATIC and kinds & NUMBERS.keys():
            leaves[field.name] = NUMBERS[(kinds & NUMBERS.keys()).pop()]
        else:
            choices.append(field.name)
    found = dict.fromkeys(name for base in cls.__mro__ for name, value in vars(base).items() if type(value) is derived)
    return leaves, (*choices, *found)


def _kinds(hint: Any) -> list[Any]:
    """The types within an annotation: float of float | None and of tuple[float, float]."""
    inner = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else ()
    return [kind for each in inner for kind in _kinds(each)] if inner else [hint]


def _array(value: Any, kind: Any) -> Any:
    plain = isinstance(value, int | float | tuple) and kind is not None
    return np.asarray(value, kind) if plain else value
