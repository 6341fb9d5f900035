"""Scaled dot-product attention by whichever kernel suits platform, type and shape.

The first of `KERNELS` that takes a case runs it, and XLA takes every case; the choice is logged once for each case.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from hypersd_jax.models.layers import precision_for

# Below this many queries the weights are small and XLA's own fusion is best; so it is for 77 keys of text.
LONG = 1024
# Queries attended at a time on a CPU, and the largest block of a TPU kernel.
BLOCK = 512
# The TPU kernel's granularity in queries and keys.
LANES = 128

# Kernels that the compiler cannot look into, nor split over devices.
OPAQUE = ("cudnn", "pallas")

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of the choice of a kernel: ``queries`` and ``keys`` count tokens, ``width`` is that of one head."""

    platform: str
    dtype: str
    queries: int
    keys: int
    width: int
    causal: bool


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    keep: jax.Array | None = None,
    platform: str | None = None,
    batch_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Attend from q (B, L, H, D) to k and v (B, S, H, D), giving (B, L, H, D); softmax in float32.

    Args:
        q: queries.
        k: keys.
        v: values.
        causal: query i sees keys 0..i.
        keep: (B, S) bool, the keys that are seen, at least one of each sample; XLA alone can do so.
        platform: "cpu", "gpu" or "tpu"; None is JAX's default backend.
        batch_sharding: how the batch is laid out; a kernel of GPU or TPU runs on each device's part, for the compiler
            cannot split it.
    """
    if keep is not None:
        return _xla(q, k, v, causal=causal, keep=keep)
    case = Case(
        platform=platform or jax.default_backend(),
        dtype=str(q.dtype),
        queries=q.shape[1],
        keys=k.shape[1],
        width=q.shape[3],
        causal=causal,
    )
    for name, takes, run in KERNELS:
        if not takes(case):
            continue
        kernel: Kernel = functools.partial(run, causal=causal)
        if name not in OPAQUE:
            _log(case, name)
            return kernel(q, k, v)
        if batch_sharding is not None:
            if q.shape[0] % batch_sharding.mesh.size:
                continue
            kernel = _by_device(kernel, batch_sharding)
        try:
            out = kernel(q, k, v)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            # This machine's library refuses what its rules seemed to allow: an old cuDNN, an old card.
            _log(case, f"{name} is not available here ({str(error).splitlines()[0]})")
            continue
        _log(case, name)
        return out
    raise AssertionError("xla takes every case")


def _takes_cudnn(case: Case) -> bool:
    """Half precision and heads of up to 128 in eights, which cards from Ampere on have."""
    return (
        case.platform == "gpu"
        and case.dtype in ("bfloat16", "float16")
        and case.width % 8 == 0
        and case.width <= 128
        and min(case.queries, case.keys) >= LONG
    )


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def _takes_pallas(case: Case) -> bool:
    """bfloat16, for the kernel's products are; whole blocks of queries and keys."""
    return (
        case.platform == "tpu"
        and case.dtype == "bfloat16"
        and (case.width <= LANES or case.width % LANES == 0)
        and min(case.queries, case.keys) >= LONG
        and case.queries % LANES == 0
        and case.keys % LANES == 0
    )


def _pallas(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """JAX's own splash attention for TPU, with blocks that divide the sequences.

    Two kernels backward, one for q and one for k and v: fused into one they hold four times the memory.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        FullMask,
        MultiHeadMask,
        make_splash_mha_single_device,
    )

    queries, keys = _block(q.shape[1]), _block(k.shape[1])
    sizes = BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
    mask = (CausalMask if causal else FullMask)((q.shape[1], k.shape[1]))
    kernel = make_splash_mha_single_device(MultiHeadMask([mask] * q.shape[2]), block_sizes=sizes)
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    out = jax.vmap(kernel)(*(jnp.swapaxes(x, 1, 2) for x in (scaled, k, v)))
    return jnp.swapaxes(out, 1, 2)


def _block(length: int) -> int:
    """The largest multiple of `LANES` up to `BLOCK` that divides the length."""
    return next(size for size in range(BLOCK, 0, -LANES) if length % size == 0)


def _takes_blocks(case: Case) -> bool:
    return case.platform == "cpu" and not case.causal and case.queries >= LONG


def _blocks(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """One head and one block of queries at a time, which keeps the (L, S) weights in cache; recomputed backward."""
    del causal
    b, length, h, d = q.shape
    precision = precision_for(q.dtype)
    blocks = -(-length // BLOCK)

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 2, 1).reshape(b * h, x.shape[1], d)

    @jax.checkpoint
    def one_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        logits = jnp.matmul(q, k.T, precision=precision, preferred_element_type=jnp.float32) * d**-0.5
        return jnp.matmul(jax.nn.softmax(logits, axis=-1).astype(v.dtype), v, precision=precision)

    def head(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = qkv
        return lax.map(lambda block: one_head(block, k, v), q)

    padded = jnp.pad(by_head(q), ((0, 0), (0, blocks * BLOCK - length), (0, 0))).reshape(b * h, blocks, BLOCK, d)
    out = lax.map(head, (padded, by_head(k), by_head(v))).reshape(b, h, blocks * BLOCK, d)
    return jnp.moveaxis(out[:, :, :length], 1, 2)


def _takes_any(_case: Case) -> bool:
    return True


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, keep: jax.Array | None = None) -> jax.Array:
    precision = precision_for(q.dtype)
    logits = jnp.einsum("blhd,bshd->bhls", q, k, precision=precision, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if causal:
        before = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None, None]
        logits = jnp.where(before, logits, -jnp.inf)
    if keep is not None:
        logits = jnp.where(keep[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhls,bshd->blhd", weights, v, precision=precision)


KERNELS: tuple[tuple[str, Callable[[Case], bool], Any], ...] = (
    ("cudnn", _takes_cudnn, _cudnn),
    ("pallas", _takes_pallas, _pallas),
    ("blocks", _takes_blocks, _blocks),
    ("xla", _takes_any, _xla),
)
"""(name, what it takes, how it runs), best first."""


def choose(case: Case) -> str:
    """The name of the kernel that is tried first."""
    return next(name for name, takes, _ in KERNELS if takes(case))


def _by_device(kernel: Kernel, batch_sharding: NamedSharding) -> Kernel:
    spec = jax.sharding.PartitionSpec(batch_sharding.spec[0])
    return jax.shard_map(kernel, mesh=batch_sharding.mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)


@functools.cache
def _log(case: Case, what: str) -> None:
    logger.info("attention %dx%dx%d %s on %s: %s", case.queries, case.keys, case.width, case.dtype, case.platform, what)
