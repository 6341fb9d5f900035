"""The device that these tests compare with the CPU."""

from __future__ import annotations

import os

import jax
import pytest

VARIABLE = "HYPERSD_GPU_TESTS"


@pytest.fixture(scope="session")
def gpu() -> jax.Device:
    """The GPU, or what stands in its place where the tests themselves are tried: the last CPU device."""
    where = os.environ.get(VARIABLE)
    if where == "cpu":
        return jax.devices("cpu")[-1]
    if where != "gpu":
        pytest.skip(f"{VARIABLE}=gpu runs this on a GPU; the suite runs on the CPU")
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no GPU: {error}")


@pytest.fixture(scope="session")
def cpu() -> jax.Device:
    return jax.devices("cpu")[0]
