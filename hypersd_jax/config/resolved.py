"""The types of a dataclass's fields, looked up once."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@functools.cache
def resolved(cls: type) -> Mapping[str, Any]:
    """Evaluate a dataclass's annotations, by field; doing so anew took most of the time of reading a recipe."""
    return MappingProxyType(typing.get_type_hints(cls, include_extras=True))
