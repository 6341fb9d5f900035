"""Features of images of few pixels, where a test is of what is done with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from hypersd_jax.evaluation import lite0, scorer

SIDE = 32
_PROGRAMS = (lite0._extract, scorer._tower_input, scorer._thumbnails)


@contextlib.contextmanager
def small_features() -> Iterator[pytest.MonkeyPatch]:
    """The network of the features reads images of 32 px, a sixteenth of its pixels; the patch is there for more."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (lite0, scorer):
            patch.setattr(module, "SMALL", SIDE)
        _forget()
        yield patch
    _forget()


def _forget() -> None:
    """The size is part of the programs."""
    for program in _PROGRAMS:
        program.clear_cache()
