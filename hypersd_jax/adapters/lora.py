"""LoRA adapters as plain trees: what is adapted, how one starts, and how several become one.

An adapter is a flat dict ``{dotted module path: {"down", "up", "scale"}}`` of float32 arrays (Hu et al. 2021,
arXiv 2106.09685, W' = W + (alpha / r) B A, with A = down and B = up):

    Linear (in, out)            down (in, r)           up (r, out)    scale (r,)
    Conv   (kh, kw, in, out)    down (kh, kw, in, r)   up (r, out)    scale (r,)

``scale`` holds alpha / r times the user's scale for each rank component. Being a vector, it lets several LoRAs with
their own scales be one adapter of the summed rank, exactly (`concatenate`), and lets zeros pad a rank (`pad`).
Leaves are JAX or NumPy arrays. `scaled`, `concatenate` and `pad` keep NumPy leaves on the host, where an adapter read
from a file is combined without compiling anything and then put on the devices once.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.errors import UserError

Array = jax.Array | np.ndarray
Adapter = dict[str, dict[str, Array]]

TARGETS_14: tuple[str, ...] = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""The modules that LCM-LoRA, DMD2 and Hyper-SD adapt: every layer of the UNet's blocks, no norm, no input, output or
embedding layer."""

BUCKETS: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Ranks that sampling compiles for; larger ones go on doubling."""


def target_paths(shapes: Mapping[str, Any], targets: Sequence[str] = TARGETS_14) -> list[str]:
    """The paths of the modules in `shapes` that end with one of `targets` and have a kernel.

    Args:
        shapes: ``{parameter path: anything}``, for example a network's shape tree.
        targets: module names, each matched against whole trailing path components ("to_q" does not match "xto_q").
    """
    suffixes = tuple("." + target for target in targets)
    modules = (path.removesuffix(".kernel") for path in shapes if path.endswith(".kernel"))
    return [module for module in modules if ("." + module).endswith(suffixes)]


def init(
    key: jax.Array,
    shapes: Mapping[str, Any],
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = TARGETS_14,
) -> Adapter:
    """A fresh adapter whose delta is zero: `down` uniform in +-1/sqrt(fan_in) as in PEFT and kohya, `up` zero.

    A module's values depend on `key` and its path only, so adding a target leaves the others as they were.

    Args:
        key: a JAX random key.
        shapes: ``{parameter path: object with .shape}``; only shapes are read, so this runs under `jax.jit`.
        rank: the common rank r.
        alpha: the scale is alpha / rank; None means alpha = rank.
        targets: see `target_paths`.

    Raises:
        UserError: nothing matches `targets`, or the rank is below 1.
    """
    paths = target_paths(shapes, targets)
    if not paths:
        raise UserError(f"LoRA targets {', '.join(targets)}: the model has no such module")
    if rank < 1:
        raise UserError(f"LoRA rank {rank}: it must be at least 1")
    scale = 1.0 if alpha is None else alpha / rank
    kernels = {path: tuple(shapes[path + ".kernel"].shape) for path in paths}
    downs = _uniform(key, tuple((path, (*kernel[:-1], rank)) for path, kernel in kernels.items()))
    return {
        path: {
            "down": downs[path],
            "up": jnp.zeros((rank, kernel[-1]), jnp.float32),
            "scale": jnp.full((rank,), scale, jnp.float32),
        }
        for path, kernel in kernels.items()
    }


@functools.partial(jax.jit, static_argnums=1)
def _uniform(key: jax.Array, downs: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, jax.Array]:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for each (path, shape of down), all modules of one shape at once.

    SDXL at one rank has 788 modules in 17 shapes; a generator for each module takes ten times as long to compile.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for path, shape in downs:
        groups.setdefault(shape, []).append(path)
    found: dict[str, jax.Array] = {}
    for shape, paths in groups.items():
        bound = 1.0 / math.sqrt(math.prod(shape[:-1]))
        hashes = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, hashes)
        generate = functools.partial(jax.random.uniform, shape=shape, dtype=jnp.float32, minval=-bound, maxval=bound)
        found |= dict(zip(paths, jax.vmap(generate)(keys), strict=True))
    return found


def scaled(adapter: Adapter, scale: float | jax.Array) -> Adapter:
    """Return an adapter that is `scale` times as strong."""
    factor = scale.astype(jnp.float32) if isinstance(scale, jax.Array) else np.float32(scale)
    return {path: {**entry, "scale": entry["scale"] * factor} for path, entry in adapter.items()}


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """Join adapters to one whose delta is the sum of theirs: ranks are laid side by side, modules united."""
    entries: dict[str, list[dict[str, Array]]] = {}
    for adapter in adapters:
        for path, entry in adapter.items():
            entries.setdefault(path, []).append(entry)
    xp = _namespace(*adapters)
    return {
        path: {
            "down": xp.concatenate([part["down"] for part in parts], axis=-1),
            "up": xp.concatenate([part["up"] for part in parts], axis=0),
            "scale": xp.concatenate([part["scale"] for part in parts]),
        }
        for path, parts in entries.items()
    }


def bucket(rank: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest of `buckets` that holds `rank`; past the last of them, its doublings."""
    for size in buckets:
        if rank <= size:
            return size
    size = buckets[-1]
    while size < rank:
        size *= 2
    return size


def pad(adapter: Adapter, buckets: Sequence[int] = BUCKETS) -> Adapter:
    """Return an adapter of the same delta, with every module's rank padded by zeros to one common bucket.

    A compiled sampler then serves any adapter of the same modules and bucket.
    """
    if not adapter:
        return {}
    rank = bucket(max(entry["scale"].shape[0] for entry in adapter.values()), buckets)
    xp = _namespace(adapter)

    def padded(entry: dict[str, Array]) -> dict[str, Array]:
        missing = (0, rank - entry["scale"].shape[0])
        return {
            "down": xp.pad(entry["down"], [(0, 0)] * (entry["down"].ndim - 1) + [missing]),
            "up": xp.pad(entry["up"], [missing, (0, 0)]),
            "scale": xp.pad(entry["scale"], [missing]),
        }

    return {path: padded(entry) for path, entry in adapter.items()}


def split(adapter: Adapter) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
    """Split an adapter into its trainable factors ``{path: {"down", "up"}}`` and its scales ``{path: (r,)}``."""
    factors = {path: {"down": entry["down"], "up": entry["up"]} for path, entry in adapter.items()}
    return factors, {path: entry["scale"] for path, entry in adapter.items()}


def join(factors: Mapping[str, Mapping[str, Array]], scales: Mapping[str, Array]) -> Adapter:
    """The inverse of `split`."""
    return {path: {"down": pair["down"], "up": pair["up"], "scale": scales[path]} for path, pair in factors.items()}


def _namespace(*adapters: Adapter) -> Any:
    """NumPy where every leaf is NumPy's, else jax.numpy."""
    leaves = (leaf for adapter in adapters for entry in adapter.values() for leaf in entry.values())
    return np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
