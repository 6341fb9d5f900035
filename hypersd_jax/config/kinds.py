"""The kinds of a configuration class, by the names that a recipe writes."""

from __future__ import annotations

import typing
from collections.abc import Iterator

from hypersd_jax.config.resolved import resolved


def kinds(cls: type) -> dict[str, type]:
    """Find the subclasses of ``cls`` that have a ``kind``, by each of its names, in the order of definition."""
    found: dict[str, type] = {}
    each: type
    for each in _below(cls):
        if (hint := resolved(each).get("kind")) is not None:
            found |= dict.fromkeys(typing.get_args(hint), each)
    return found


def _below(cls: type) -> Iterator[type]:
    below: list[type] = cls.__subclasses__()
    for each in below:
        yield each
        yield from _below(each)
