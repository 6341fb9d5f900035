"""Read a network's parameters from files that keep them anywhere: under other names, fused, transposed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.weights.diffusers.component import cast, read_finite, require_fit
from hypersd_jax.weights.keys import from_torch, torch_key, torch_shape
from hypersd_jax.weights.single_file.keys import Stored
from hypersd_jax.weights.tensors import TensorFile

Shapes = Mapping[str, jax.ShapeDtypeStruct]
Locate = Callable[[str], Stored]
"""Tells where the files keep the tensor of a canonical key."""


def read_located(
    origin: Path, files: Sequence[TensorFile], shapes: Shapes, locate: Locate, extras: re.Pattern[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters by path, one at a time, in the types and order of `shapes`.

    Args:
        origin: named in messages.
        files: the open files, which hold one model together.
        shapes: abstract value of every parameter by path.
        locate: see `Locate`.
        extras: stored keys that may be passed over where no parameter is kept under them.

    Raises:
        UserError: all that is missing, unexpected, stored twice or of another shape or type in one line, before the
            first parameter; or the first tensor that holds something else than finite numbers.
    """
    locations = {path: locate(torch_key(path)) for path in shapes}
    wanted = {place.key: place.shape(torch_shape(path, shapes[path].shape)) for path, place in locations.items()}
    holders: dict[str, TensorFile] = {}
    misfits = []
    for file in files:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            if key not in wanted and extras.search(key):
                continue
            if key in holders:
                misfits.append(f"{key} stored twice")
            holders[key] = file
    for key in holders.keys() & wanted.keys():
        found = holders[key].shape(key)
        if found != wanted[key]:
            misfits.append(f"{key} {list(found)} instead of {list(wanted[key])}")
        elif not jnp.issubdtype(holders[key].dtype(key), jnp.floating):
            misfits.append(f"{key} of type {holders[key].dtype(key)}")
    missing = [key for key in wanted if key not in holders]
    require_fit(origin, missing, sorted(holders.keys() - wanted.keys()), sorted(misfits))
    key, stored = "", np.empty(0)
    for path, place in locations.items():
        # The parts of a fused tensor follow one another, and it is read once.
        if place.key != key:
            key, stored = place.key, read_finite(holders[place.key], place.key)
        yield path, cast(from_torch(path, place.take(stored)), shapes[path].dtype, holders[key].path, key)
