"""Names that a caller or a file may give, and the refusal of any other."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from hypersd_jax.errors import UserError, shown


def require_name(key: str, name: object, valid: Iterable[str]) -> str:
    """`name` if it is one of `valid`, else a UserError that names `key` and the nearest valid spelling."""
    valid = tuple(valid)
    if isinstance(name, str) and name in valid:
        return name
    nearest = difflib.get_close_matches(str(name)[:80], valid, n=1, cutoff=0.0)[0]
    raise UserError(f"{key}: unknown value {shown(name)}; did you mean {nearest!r}? (valid: {', '.join(valid)})")
