"""Training steps that were skipped because loss or gradient was not finite: a warning, and many in a row an error."""

from __future__ import annotations

import warnings
from collections import deque

import jax

from hypersd_jax.errors import UserError
from hypersd_jax.training.agreement import LAG


class SkipWatch:
    """Watches the state's counter of skipped steps, a few steps late, so that the devices never wait for it.

    Attributes:
        in_a_row: the last steps that were skipped one after the other, as far as has been read.
    """

    def __init__(self, stage: str, *, updates: int, limit: int, remedy: str, skipped: int, in_a_row: int = 0) -> None:
        """Begin with a state's counter.

        Args:
            stage: its name.
            updates: training steps of the stage.
            limit: how many in a row end the run; half of the stage where that is fewer.
            remedy: what the messages advise.
            skipped: the counter so far.
            in_a_row: how many of them were the last ones.
        """
        self.in_a_row = in_a_row
        self._stage, self._updates, self._remedy = stage, updates, remedy
        self._limit = min(limit, (updates + 1) // 2)
        self._skipped = skipped
        self._warned = False
        self._pending: deque[tuple[int, jax.Array]] = deque()

    def add(self, number: int, skipped: jax.Array) -> None:
        """Take the counter after step ``number``, and check that of `LAG` steps before.

        Raises:
            UserError: too many in a row.
        """
        skipped.copy_to_host_async()
        self._pending.append((number, skipped))
        if len(self._pending) > LAG:
            self._check(*self._pending.popleft())

    def settle(self) -> None:
        """Check all that is left, before the state is saved or exported. Waits for the devices."""
        while self._pending:
            self._check(*self._pending.popleft())

    def _check(self, number: int, counter: jax.Array) -> None:
        skipped = int(counter)
        self.in_a_row = self.in_a_row + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if self.in_a_row and not self._warned and jax.process_index() == 0:
            self._warned = True
            warnings.warn(
                f"stage {self._stage}, update {number} of {self._updates}: loss or gradient is not finite, so the "
                f"update is skipped; if more follow, {self._remedy}",
                stacklevel=4,
            )
        if self.in_a_row >= self._limit:
            raise UserError(
                f"stages.{self._stage}: {self.in_a_row} updates in a row, up to update {number} of {self._updates}, "
                f"were skipped, since loss or gradient was not finite; nothing of this stage was exported; "
                f"{self._remedy}, and name another output_dir or delete this one"
            )
