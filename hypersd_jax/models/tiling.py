"""An autoencoder run in overlapping tiles: the memory of one tile, whatever the size of the image.

Tiles begin every `tile - overlap` latent pixels, and each is blended linearly into the one above and the one to its
left, as in diffusers' `AutoencoderKL.enable_tiling` with `overlap / tile` as its overlap factor. Unlike there, no tile
is run that lies wholly inside the one before it, so the last of a row is seldom a thin strip. What is left has at most
two lengths a side, whole and rest, so at most four shapes; all tiles of a shape go through one `lax.map`, which
compiles the network once for each and holds the insides of one tile at a time, inside `jax.jit` as well as outside.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

T = TypeVar("T")
Span = tuple[int, int]


def decode_tiled(decode: Callable[[jax.Array], T], latents: jax.Array, *, tile: int, overlap: int, factor: int) -> T:
    """Decode latents (B, h, w, C) in tiles.

    Args:
        decode: latents (B, h', w', C) of any size to an array, or a tree of arrays, (B, h' factor, w' factor, ...).
        latents: what to decode; one no larger than a tile is decoded as a whole.
        tile: side of a tile, in latent pixels.
        overlap: how many of them it shares with the next, at most half.
        factor: image pixels per latent pixel, along each side.

    Returns:
        What `decode` would, (B, h factor, w factor, ...).
    """
    return _tiled(decode, latents, tile=tile, overlap=overlap, grain=1, magnify=factor)


def encode_tiled(encode: Callable[[jax.Array], T], images: jax.Array, *, tile: int, overlap: int, factor: int) -> T:
    """Encode images (B, H, W, C) in tiles, `tile` and `overlap` in latent pixels as for `decode_tiled`.

    Raises:
        ValueError: `factor` does not divide the images' sides.
    """
    if any(side % factor for side in images.shape[1:3]):
        raise ValueError(f"images of {images.shape[1:3]} pixels are not tiled by a factor of {factor}")
    return _tiled(encode, images, tile=tile, overlap=overlap, grain=factor, magnify=1)


def _tiled(run: Callable[[jax.Array], T], x: jax.Array, *, tile: int, overlap: int, grain: int, magnify: int) -> T:
    """Run tiles of `x`, of which `grain` pixels, along each side, become `magnify` pixels of the outcome."""
    if not 0 < 2 * overlap <= tile:
        raise ValueError(f"an overlap of {overlap} does not lie in 1..{tile // 2}, half a tile of {tile}")
    rows, columns = (_spans(side // grain, tile, overlap) for side in x.shape[1:3])
    if len(rows) == len(columns) == 1:
        return run(x)
    outcomes: dict[tuple[Span, Span], Any] = {}
    for height, width in product(_lengths(rows), _lengths(columns)):
        equal = [tile for tile in product(rows, columns) if (tile[0][1], tile[1][1]) == (height, width)]
        corners = np.array([(row[0] * grain, column[0] * grain) for row, column in equal], np.int32)
        size = (x.shape[0], height * grain, width * grain, x.shape[3])

        def one(corner: jax.Array, size: tuple[int, ...] = size) -> T:
            return run(lax.dynamic_slice(x, (0, corner[0], corner[1], 0), size))

        tiles = lax.map(one, corners)
        outcomes |= {tile: jax.tree.map(lambda leaf, i=i: leaf[i], tiles) for i, tile in enumerate(equal)}

    def join(*leaves: jax.Array) -> jax.Array:
        grid = [list(leaves[i : i + len(columns)]) for i in range(0, len(leaves), len(columns))]
        return _join(grid, (tile - overlap) * magnify, overlap * magnify)

    return jax.tree.map(join, *(outcomes[tile] for tile in product(rows, columns)))


def _spans(side: int, tile: int, overlap: int) -> list[Span]:
    """(begin, length) of the tiles along a side; each but the last is whole, and the last reaches the end."""
    stride = tile - overlap
    count = 1 + max(0, -(-(side - tile) // stride))
    return [(i * stride, min(tile, side - i * stride)) for i in range(count)]


def _lengths(spans: list[Span]) -> list[int]:
    return sorted({length for _, length in spans}, reverse=True)


def _join(tiles: list[list[jax.Array]], stride: int, blend: int) -> jax.Array:
    """Blend a grid of outcomes (B, h', w', C) into one, each upwards and then to the left.

    The order matters where four tiles meet: a tile is blended into neighbours that are blended already.
    """
    down, right = len(tiles), len(tiles[0])
    for i, j in product(range(down), range(right)):
        if i:
            tiles[i][j] = _blend(tiles[i - 1][j], tiles[i][j], blend, axis=1)
        if j:
            tiles[i][j] = _blend(tiles[i][j - 1], tiles[i][j], blend, axis=2)
    kept = [
        [one[:, : stride if i < down - 1 else None, : stride if j < right - 1 else None] for j, one in enumerate(row)]
        for i, row in enumerate(tiles)
    ]
    return jnp.concatenate([jnp.concatenate(row, axis=2) for row in kept], axis=1)


def _blend(before: jax.Array, after: jax.Array, extent: int, *, axis: int) -> jax.Array:
    """Fade from the end of `before` to the beginning of `after`, over `extent` pixels."""
    shape = [1, 1, 1, 1]
    shape[axis] = extent
    ramp = (jnp.arange(extent, dtype=jnp.float32) / extent).astype(after.dtype).reshape(shape)
    end = lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    begin = lax.slice_in_dim(after, 0, extent, axis=axis)
    rest = lax.slice_in_dim(after, extent, after.shape[axis], axis=axis)
    return jnp.concatenate([end * (1 - ramp) + begin * ramp, rest], axis=axis)
