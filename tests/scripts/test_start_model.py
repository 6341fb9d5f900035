"""scripts/build_start_model.py: what one network takes from another keeps its meaning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.models.layers import timestep_embedding
from scripts.build_start_model import FEATURES, JOINED, TIME, joined, kept, time_embedding


def arrays(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(len(shapes))
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}


def test_times_are_embedded_as_before() -> None:
    old = arrays(**{TIME + "kernel": (64, 8), TIME + "bias": (8,)})
    new = arrays(**{TIME + "kernel": (128, 8), TIME + "bias": (8,)})
    found = dict(time_embedding(old, new))
    t = jnp.asarray([0, 1, 500, 999])
    before = timestep_embedding(t, 64) @ old[TIME + "kernel"]
    after = timestep_embedding(t, 128) @ found[TIME + "kernel"]
    assert found[TIME + "bias"] is old[TIME + "bias"]
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_what_has_another_shape_is_not_taken() -> None:
    old = arrays(**{"b.1.kernel": (2, 3), "b.1.bias": (3,), "c.bias": (4,)})
    new = arrays(**{"b.0.kernel": (5, 3), "b.0.bias": (3,), "c.bias": (4,)})
    found = dict(kept(old, new, (("b.0.", "b.1."),)))
    assert list(found) == ["b.0.bias"]
    assert found["b.0.bias"] is old["b.1.bias"]


def test_the_last_resnet_keeps_what_reads_the_features() -> None:
    kernel, scale, bias = JOINED + "conv1.kernel", JOINED + "norm1.scale", JOINED + "conv1.bias"
    old = arrays(**{kernel: (3, 3, FEATURES + 2, 4), scale: (FEATURES + 2,), bias: (4,)})
    new = arrays(**{kernel: (3, 3, FEATURES + 6, 4), scale: (FEATURES + 6,), bias: (4,)})
    found = dict(joined(old, new))
    assert found.keys() == {kernel, scale}
    np.testing.assert_array_equal(found[kernel][:, :, :FEATURES], old[kernel][:, :, :FEATURES])
    np.testing.assert_array_equal(found[kernel][:, :, FEATURES:], new[kernel][:, :, FEATURES:])
    np.testing.assert_array_equal(found[scale][:FEATURES], old[scale][:FEATURES])
    np.testing.assert_array_equal(found[scale][FEATURES:], new[scale][FEATURES:])
