"""The role of each setting in the compiled training step.

Numbers are its arguments: another value compiles nothing. Choices (words, booleans, whether a part is there at all) are
part of the program. A field says here if its type does not tell, or if the step does not see it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

ROLE = "role"
STATIC, OUTSIDE = "static", "outside"


def static(default: Any = dataclasses.MISSING) -> Any:
    """A number that is compiled into the step: a loop's length, a constant of the optimizer."""
    return dataclasses.field(default=default, metadata={ROLE: STATIC})


def outside(default: Any = dataclasses.MISSING) -> Any:
    """A setting that the step does not see: a name, a file, how the student is sampled."""
    return dataclasses.field(default=default, metadata={ROLE: OUTSIDE})


class derived(functools.cached_property[Any]):
    """A choice that follows from the numbers, such as whether a term is there at all; part of the program too."""
