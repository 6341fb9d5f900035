"""One component in a single .safetensors file: read by where each parameter is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.weights.diffusers.component import cast, read_finite, require_fit
from hypersd_jax.weights.keys import from_torch, torch_key, torch_shape
from hypersd_jax.weights.single_file.keys import Stored
from hypersd_jax.weights.tensors import TensorFile

Shapes = Mapping[str, jax.ShapeDtypeStruct]
Read = Callable[[Shapes, Any], Iterator[tuple[str, np.ndarray]]]
"""``(shapes, dtype)`` to pairs of our path and an array, one at a time."""


def read_part(file: TensorFile, keys: set[str], location: Callable[[str], Stored]) -> Read:
    """Make the reader of a component from the tensors `keys` of `file`.

    Args:
        file: the open file.
        keys: its tensors that belong to the component, each of which must be used.
        location: where the file keeps the tensor of a canonical diffusers key.

    Returns:
        A function that raises one UserError with all that is missing, unknown or does not fit, before it reads.
    """

    def read(shapes: Shapes, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
        locations = {(stored := location(torch_key(path))).key: (path, stored) for path in shapes}
        sizes = {key: torch_shape(path, shapes[path].shape) for key, (path, _) in locations.items()}
        misfits = []
        for key in sorted(keys & locations.keys()):
            found, stored = file.shape(key), locations[key][1]
            if found != sizes[key] and not (stored.pointwise and found == stored.shape(sizes[key])):
                misfits.append(f"{key} {list(found)} instead of {list(sizes[key])}")
            elif not jnp.issubdtype(file.dtype(key), jnp.floating):
                misfits.append(f"{key} of type {file.dtype(key)}")
        require_fit(file.path, [key for key in locations if key not in keys], sorted(keys - locations.keys()), misfits)
        for key in (key for key in file.keys() if key in locations):  # noqa: SIM118 - not a mapping
            path = locations[key][0]
            yield path, cast(from_torch(path, read_finite(file, key).reshape(sizes[key])), dtype, file.path, key)

    return read
