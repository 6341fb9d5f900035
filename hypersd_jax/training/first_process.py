"""What the first of several processes decides for all of them: what it found on disk, and that it could not go on.

Every process calls these at the same place. The others must not look at files that the first one writes: what they see
of shared storage may be older.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from hypersd_jax.errors import UserError

LONGEST = 2000
"""Bytes of a message that reach the other processes."""


def from_first(value: int) -> int:
    """Return the first process's number in all of them."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def on_first(action: Callable[[], None]) -> None:
    """Let the first process act while the others wait; what it refuses, all of them refuse.

    Raises:
        UserError: the first process's.
    """
    if jax.process_count() == 1:
        action()
        return
    message = b""
    if jax.process_index() == 0:
        try:
            action()
        except UserError as error:
            message = str(error).encode()[:LONGEST]
    padded = np.frombuffer(message.ljust(LONGEST, b"\0"), np.uint8)
    told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)).rstrip(b"\0")
    if told:
        raise UserError(told.decode(errors="replace"))


def wait_for_all() -> None:
    """Wait until every process is here, however long the first one writes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("hypersd_jax")
