"""3x3 convolutions with fewer multiplications: Winograd's F(2x2) and F(4x4), for kernels that do not change.

Square tiles of the output, m a side, are computed from tiles of the input, n = m + 2 a side, both in a transformed
space in which the convolution is one product of a tile's element with the kernel's: n^2 multiplications where a direct
convolution does 9 m^2, so 2.25 (m = 2) and 4 times fewer (m = 4). In between, every element of all tiles is a matrix of
tiles by channels, multiplied by the kernel's matrix of channels. Lavin and Gray, "Fast Algorithms for Convolutional
Neural Networks", arXiv 1509.09308.

A transformed kernel takes 16/9 or 4 times the original's memory and is worth making once, for many calls: it is made
of frozen weights (`models.prepared`). Relative errors in float32: 1e-6 for m = 2, 5e-6 for m = 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Tiles of a batch from which a product of its own for each of the n^2 elements is faster than a batched one: 9 % at
# 1,024 tiles of 512 channels, 16 % at 4,096 of 256; at 256 tiles of 640 it is half as fast.
MANY_TILES = 1024

# Between what sizes of features tiles are faster than a direct convolution, see `pays`.
FEWEST_TILES = 64
MOST_PIXELS = 160 * 160

Grid = list[list[jax.Array]]
"""Elements of all tiles: rows of columns, each an array (B, tiles down, tiles across, C)."""


class Transforms(NamedTuple):
    """What multiplies the tiles from left and, transposed, from right: of the input, the kernel and the output."""

    inputs: np.ndarray  # (n, n)
    kernel: np.ndarray  # (n, 3)
    outputs: np.ndarray  # (m, n)


TRANSFORMS = {
    2: Transforms(
        inputs=np.asarray([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32),
        kernel=np.asarray([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32),
        outputs=np.asarray([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32),
    ),
    4: Transforms(
        inputs=np.asarray(
            [
                [4, 0, -5, 0, 1, 0],
                [0, -4, -4, 1, 1, 0],
                [0, 4, -4, -1, 1, 0],
                [0, -2, -1, 2, 1, 0],
                [0, 2, -1, -2, 1, 0],
                [0, 4, 0, -5, 0, 1],
            ],
            np.float32,
        ),
        kernel=np.asarray(
            [
                [1 / 4, 0, 0],
                [-1 / 6, -1 / 6, -1 / 6],
                [-1 / 6, 1 / 6, -1 / 6],
                [1 / 24, 1 / 12, 1 / 6],
                [1 / 24, -1 / 12, 1 / 6],
                [0, 0, 1],
            ],
            np.float32,
        ),
        outputs=np.asarray(
            [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32
        ),
    ),
}
"""By the output tile's side m; with the points 0, 1, -1 and, for m = 4, 2 and -2."""


def transform(kernel: jax.Array, m: int) -> jax.Array:
    """Transform a kernel (3, 3, in, out) to (n^2, in, out), n = m + 2, by one product with a matrix (n^2, 9)."""
    rows = TRANSFORMS[m].kernel
    product = jnp.matmul(jnp.asarray(np.kron(rows, rows)), kernel.reshape(9, -1), precision=lax.Precision.HIGHEST)
    return product.reshape(-1, *kernel.shape[2:])


def tile_side(transformed: jax.Array | jax.ShapeDtypeStruct) -> int:
    """The output tile's side m that a transformed kernel (n^2, in, out) is for."""
    return math.isqrt(transformed.shape[0]) - 2


def pays(x: jax.Array, transformed: jax.Array) -> bool:
    """Tell whether features (B, H, W, in) are large enough, and small enough, to be faster for it: see `prepared`.

    Below 64 tiles the kernel, which is larger transformed, weighs more than the products that it saves; far above, the
    transforms of large features are bound by memory.
    """
    m, (b, h, w, _) = tile_side(transformed), x.shape
    return x.dtype == jnp.float32 and b * -(-h // m) * -(-w // m) >= FEWEST_TILES and h * w <= MOST_PIXELS


def convolve_tiles(x: jax.Array, transformed: jax.Array) -> jax.Array:
    """Convolve (B, H, W, in), stride 1, padding 1, with a transformed kernel (n^2, in, out), giving (B, H, W, out).

    The gradient of the input is written out with the same transformed kernel; that of the kernel is zero, for it is
    meant to be frozen.
    """
    return _convolve(x, lax.stop_gradient(transformed))


@jax.custom_vjp
def _convolve(x: jax.Array, transformed: jax.Array) -> jax.Array:
    m = tile_side(transformed)
    (_, h, w, _), matrices = x.shape, TRANSFORMS[m]
    down, across = -(-h // m), -(-w // m)
    # One row and column around, and as many more as fill the last tiles.
    x = jnp.pad(x, ((0, 0), (1, 1 + down * m - h), (1, 1 + across * m - w), (0, 0)))
    tiles = [
        [x[:, i : i + m * (down - 1) + 1 : m, j : j + m * (across - 1) + 1 : m] for j in range(m + 2)]
        for i in range(m + 2)
    ]
    products = _multiply(_both_sides(matrices.inputs, tiles), transformed, 1)
    return _join(_both_sides(matrices.outputs, products))[:, :h, :w]


def _save(x: jax.Array, transformed: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _convolve(x, transformed), transformed


def _gradient(transformed: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    """Every step of the convolution transposed, the last first; where input tiles overlap, their gradients add up."""
    m = tile_side(transformed)
    (_, h, w, _), matrices = g.shape, TRANSFORMS[m]
    g = jnp.pad(g, ((0, 0), (0, -h % m), (0, -w % m), (0, 0)))
    parts = [[g[:, i::m, j::m] for j in range(m)] for i in range(m)]
    products = _multiply(_both_sides(matrices.outputs.T, parts), transformed, 2)
    tiles = _both_sides(matrices.inputs.T, products)
    columns = [_overlapped(column, 1) for column in zip(*tiles, strict=True)]
    rows = [_overlapped(row, 2) for row in zip(*columns, strict=True)]
    return _join(rows)[:, :h, :w], None


_convolve.defvjp(_save, _gradient)


def _combined(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """A small matrix times a vector of arrays, written out in additions: its entries are mostly 0, 1 and -1."""

    def scaled(factor: float, part: jax.Array) -> jax.Array:
        return part if factor == 1 else -part if factor == -1 else jnp.asarray(factor, part.dtype) * part

    return [
        sum((scaled(factor, part) for factor, part in found[1:]), start=scaled(*found[0]))
        for row in matrix.tolist()
        if (found := [(factor, part) for factor, part in zip(row, parts, strict=True) if factor])
    ]


def _both_sides(matrix: np.ndarray, grid: Grid) -> Grid:
    """M T M^T of every tile T."""
    columns = [_combined(matrix, column) for column in zip(*grid, strict=True)]
    return [_combined(matrix, row) for row in zip(*columns, strict=True)]


def _multiply(grid: Grid, transformed: jax.Array, axis: int) -> Grid:
    """Multiply each element's matrix (tiles, channels) by the kernel's (in, out), along its `axis`."""
    n, shape = len(grid), grid[0][0].shape[:3]
    matrices = [element.reshape(math.prod(shape), -1) for row in grid for element in row]
    product: Any = partial(lax.dot_general, precision=lax.Precision.HIGHEST)
    if math.prod(shape) < MANY_TILES:
        found: Any = product(jnp.stack(matrices), transformed, (((2,), (axis,)), ((0,), (0,))))
    else:
        found = [product(matrix, transformed[i], (((1,), (axis - 1,)), ((), ()))) for i, matrix in enumerate(matrices)]
    return [[found[i * n + j].reshape(*shape, -1) for j in range(n)] for i in range(n)]


def _join(grid: Grid) -> jax.Array:
    """Tiles of m a side to (B, m tiles down, m tiles across, C)."""
    m, (b, down, across, channels) = len(grid), grid[0][0].shape
    rows = [jnp.stack(row, axis=3) for row in grid]
    return jnp.stack(rows, axis=2).reshape(b, down * m, across * m, channels)


def _overlapped(parts: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """Add up rows (or columns) of input tiles, n each: the first is the last of the tile before, the last vice versa.

    What the first and last tile have beyond the image belongs to its padding and is dropped.
    """
    found = list(parts[1:-1])
    found[0] = found[0] + _shifted(parts[-1], axis, 1)
    found[-1] = found[-1] + _shifted(parts[0], axis, -1)
    return found


def _shifted(x: jax.Array, axis: int, by: int) -> jax.Array:
    """Move tiles by one place along an axis, with zeros where none came from."""
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (by, -by, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), pads)
