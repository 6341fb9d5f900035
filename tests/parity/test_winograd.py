"""Winograd's convolutions against PyTorch's: values and the input's gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")

from hypersd_jax.models.winograd import convolve_tiles, transform
from tests.models.test_winograd import TOLERANCE, arrays, relative


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("shape", [(2, 8, 8, 12, 20), (1, 7, 9, 5, 3), (1, 3, 1, 4, 6), (1, 130, 128, 2, 2)])
def test_as_pytorch(m: int, shape: tuple[int, ...]) -> None:
    """Odd sizes, sizes below a tile, and so many tiles that each element has a product of its own."""
    b, h, w, inputs, outputs = shape
    x, kernel, g = arrays((b, h, w, inputs), (3, 3, inputs, outputs), (b, h, w, outputs))
    theirs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).double().requires_grad_(True)
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).double()
    expected = torch.nn.functional.conv2d(theirs, weight, padding=1)
    expected.backward(torch.from_numpy(g.transpose(0, 3, 1, 2).copy()).double())
    assert theirs.grad is not None
    found, pull = jax.vjp(lambda x: convolve_tiles(x, transform(jnp.asarray(kernel), m)), jnp.asarray(x))
    assert relative(found, expected.detach().numpy().transpose(0, 2, 3, 1)) < TOLERANCE[m]
    assert relative(pull(jnp.asarray(g))[0], theirs.grad.numpy().transpose(0, 2, 3, 1)) < TOLERANCE[m]
