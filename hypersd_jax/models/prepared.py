"""Frozen kernels made ready for a CPU: beside a network's parameters, Winograd's transformed 3x3 kernels.

The parameters stay what they are, and are what is saved, merged and fingerprinted. The transformed kernels are further
entries of the dictionary that compiled programs receive, `NAME.kernel` followed by `WINOGRAD`; `Network` hands them to
the layers, which still choose by the features' size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hypersd_jax.models.functional import WINOGRAD
from hypersd_jax.models.upsample import MANY_PIXELS
from hypersd_jax.models.winograd import transform

# Fewest channels, in and out, and the sides of the features between which a transformed kernel pays, see `tile_of`.
CHANNELS = 256
SIDES = 16, 128


def tile_of(side: int, inputs: int, outputs: int) -> int | None:
    """Choose the side of Winograd's tiles for features of `side` squared, 4 or 2; None where direct is as fast.

    Milliseconds direct / F(2x2) / F(4x4), float32, batch 1, 2 busy cores of an AMD EPYC (Zen 5), jax 0.10.2, forward:
    64x64x320 34/19/16, 32x32x640 39/22/17, 32x32x1280->640 51/44/33, 16x16x1280 22/13/12, 16x16x2560->1280 101/32/25,
    8x8x1280 7/5/7, 64x64x512 56/34/38, 128x128x512 206/162/114, 256x256x256 216/218/203, 512x512x128 215/344/337; with
    the input's gradient: 45/31/42, 51/26/24, 134/61/54, 39/26/36, 276/90/74, 13/13/26, 168/70/77, 424/271/270,
    437/394/459, 450/633/821. The embedded model's shapes, 64 to 192 channels at 4 to 16 pixels, gain little or nothing.
    In SD 1.5's whole UNet F(4x4) up to 2^20 elements was no faster than F(2x2) alone, took 2.4 GB instead of 1.9, and
    9 seconds more to compile instead of 4; so it is left to the largest features, whose kernels are small.
    """
    if min(inputs, outputs) < CHANNELS or not SIDES[0] <= side <= SIDES[1]:
        return None
    return 4 if side == SIDES[1] else 2


def prepare(params: Mapping[str, jax.Array], coarsest: int, most_bytes: int) -> dict[str, jax.Array]:
    """Transform those 3x3 kernels that are faster for it, within `most_bytes` in all.

    What saves most time a byte comes first: the kernels of the largest features.

    Args:
        params: of a UNet, a ControlNet or an autoencoder, float32.
        coarsest: side of its smallest features, at the size that is expected.
        most_bytes: of the transformed kernels.

    Returns:
        transformed kernels (n^2, in, out), to be added to `params`.
    """
    found = []
    for path, kernel in params.items():
        if kernel.shape[:2] == (3, 3) and kernel.dtype == jnp.float32 and (side := _side(path, params, coarsest)):
            inputs, outputs = kernel.shape[2:]
            if (m := tile_of(side, inputs, outputs)) is not None:
                found.append((-side, (m + 2) ** 2 * inputs * outputs * 4, path, m))
    result = {}
    for _, size, path, m in sorted(found):
        if size <= most_bytes:
            most_bytes -= size
            result[path + WINOGRAD] = _transform(params[path], m)
    return result


_transform = jax.jit(transform, static_argnums=1)


def _side(path: str, params: Mapping[str, jax.Array], coarsest: int) -> int | None:
    """Side of the features that a kernel reads, by the block that it stands in; None outside blocks, and of strides."""
    if ".downsamplers." in path:
        return None
    if "mid_block." in path:
        return coarsest
    if not (block := re.search(r"(down|up)_blocks\.(\d+)\.", path)):
        return None
    start = path[: block.start()] + block[1] + "_blocks."
    last = max(int(name[len(start) :].split(".")[0]) for name in params if name.startswith(start))
    number = int(block[2])
    level = last - number if block[1] == "down" else number
    if ".upsamplers." not in path:
        return coarsest << level
    side = coarsest << level + 1
    return side if side * side < 4 * MANY_PIXELS else None  # above, `Upsample` has a way of its own
