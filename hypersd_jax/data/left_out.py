"""Counts and names of what a source does not use, as far as a line has room."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 3


class LeftOut:
    """Counts of what is not used, by reason, with the first names of each."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        return ", ".join(f"{count} {why} ({self._named(why)})" for why, count in self._counts.items())

    def add(self, why: str, names: Iterable[str]) -> None:
        """Count these names under a reason; none of them changes nothing."""
        for name in names:
            self._counts[why] = self._counts.get(why, 0) + 1
            kept = self._names.setdefault(why, [])
            if len(kept) < SHOWN:
                kept.append(name)

    def _named(self, why: str) -> str:
        more = ", ..." if self._counts[why] > SHOWN else ""
        return ", ".join(self._names[why]) + more
