"""An endless stream of prompts without pictures."""

from __future__ import annotations

import warnings

import numpy as np

from hypersd_jax.data.left_out import LeftOut
from hypersd_jax.data.order import mix, shuffled
from hypersd_jax.data.rows import NO_CAPTION, Rows
from hypersd_jax.errors import UserError

PREVIEWS = 8
# What a hash is drawn for.
ORDER = 0


class PromptSource:
    """The captions of a table, shuffled anew each epoch; empty ones are left out."""

    def __init__(self, rows: Rows, *, seed: int) -> None:
        """Read them all, and count in one line what cannot be read; raises UserError where there are none."""
        self._prompts, unread = [], LeftOut()
        for row, (caption, wrong) in enumerate(rows.captions()):
            if caption:
                self._prompts.append(caption)
            elif wrong != NO_CAPTION:
                unread.add(wrong, [rows.name_of(row)])
        if not self._prompts:
            raise UserError(f"data.source: {rows.source}: none of its {len(rows)} rows holds a prompt")
        if unread:
            warnings.warn(f"data.source: {rows.source}: left out of {len(rows)} prompts: {unread}", stacklevel=3)
        self._seed = int(mix(seed, ORDER)[0])

    def __len__(self) -> int:
        """Prompts in an epoch."""
        return len(self._prompts)

    @property
    def preview_prompts(self) -> list[str]:
        """The first prompts of the file."""
        return self._prompts[:PREVIEWS]

    def prompts(self, positions: np.ndarray) -> list[str]:
        """The prompts at these positions (B,) of the stream."""
        return [self._prompts[index] for index in shuffled(positions, len(self), self._seed)]
