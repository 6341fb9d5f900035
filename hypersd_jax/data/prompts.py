"""An endless stream of prompts without images."""

from __future__ import annotations

import warnings

import numpy as np

from hypersd_jax.data.examples import NO_CAPTION, Examples
from hypersd_jax.data.left_out import LeftOut
from hypersd_jax.data.order import mix, shuffled
from hypersd_jax.errors import UserError

PREVIEWS = 8
# What a random number is for.
ORDER = 0


class PromptSource:
    """The captions of a table, shuffled anew each epoch; empty ones are left out."""

    def __init__(self, examples: Examples, *, seed: int) -> None:
        """Read them all, and count in one line what cannot be read; raises UserError where there are none."""
        self._prompts, unread = [], LeftOut()
        for row, (caption, wrong) in enumerate(examples.captions()):
            if caption:
                self._prompts.append(caption)
            elif wrong != NO_CAPTION:
                unread.add(wrong, [examples.name_of(row)])
        if not self._prompts:
            raise UserError(f"data.source: {examples.source}: none of its {len(examples)} rows holds a prompt")
        if unread:
            warnings.warn(
                f"data.source: {examples.source}: left out of {len(examples)} prompts: {unread}", stacklevel=3
            )
        self._seed = int(mix(seed, ORDER)[0])

    def __len__(self) -> int:
        """Count the prompts of an epoch."""
        return len(self._prompts)

    @property
    def preview_prompts(self) -> list[str]:
        """The first prompts of the file."""
        return self._prompts[:PREVIEWS]

    def prompts(self, positions: np.ndarray) -> list[str]:
        """Read the prompts at these positions (B,) of the stream."""
        return [self._prompts[index] for index in shuffled(positions, len(self), self._seed)]
