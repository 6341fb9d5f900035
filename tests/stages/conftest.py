"""What the tests of whole runs need of pytest."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Every file compiles training steps of its own, which would fill a worker's memory file by file."""
    yield
    jax.clear_caches()
    gc.collect()
