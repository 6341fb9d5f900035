"""Check the attention kernel that is chosen for each of the models' shapes against XLA's own form, and time both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import models
from benchmarks.gpu.kernels import count_kernels, grouped
from benchmarks.gpu.rows import Rows, reason_of
from benchmarks.gpu.timing import timed
from hypersd_jax.models import dot_product

TOKENS = 77
BATCH = 2
TOLERANCE = 2.0
"""How much farther from float32 than XLA's form in bfloat16 a kernel may be, values and gradients each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Queries, keys, heads and a head's width, and where a model has them."""

    where: str
    queries: int
    keys: int
    heads: int
    width: int


SHAPES = (
    Shape(where="SD 1.5, 512 px, level 1", queries=4096, keys=4096, heads=8, width=40),
    Shape(where="SD 1.5, 512 px, level 2", queries=1024, keys=1024, heads=8, width=80),
    Shape(where="SD 1.5, 512 px, level 3", queries=256, keys=256, heads=8, width=160),
    Shape(where="SD 1.5, 512 px, text", queries=4096, keys=TOKENS, heads=8, width=40),
    Shape(where="SDXL, 1024 px, level 2", queries=4096, keys=4096, heads=10, width=64),
    Shape(where="SDXL, 1024 px, level 3", queries=1024, keys=1024, heads=20, width=64),
    Shape(where="SDXL, 1024 px, text", queries=4096, keys=TOKENS, heads=10, width=64),
    Shape(where="autoencoder, 512 px", queries=4096, keys=4096, heads=1, width=512),
)
TINY = (
    Shape(where="tiny, long", queries=1024, keys=1024, heads=1, width=8),
    Shape(where="tiny, text", queries=64, keys=TOKENS, heads=2, width=8),
)

Arrays = tuple[jax.Array, ...]


def check(rows: Rows, *, tiny: bool) -> None:
    """Write a row for each shape: the kernel, what its program calls, errors, and seconds with and without gradient."""
    device = models.start(tiny=tiny)
    for shape in TINY if tiny else SHAPES:
        try:
            rows.add("attention", **dataclasses.asdict(shape), **_compare(shape, device))
        except Exception as error:  # the other shapes may work
            rows.add("attention", **dataclasses.asdict(shape), failure=reason_of(error))


def _compare(shape: Shape, device: jax.Device) -> dict[str, Any]:
    case = dot_product.Case(
        platform=device.platform,
        dtype="bfloat16",
        queries=shape.queries,
        keys=shape.keys,
        width=shape.width,
        causal=False,
    )
    random = np.random.default_rng(0)
    lengths = shape.queries, shape.keys, shape.keys, shape.queries
    normal = [random.standard_normal((BATCH, each, shape.heads, shape.width), np.float32) for each in lengths]
    half = [jnp.asarray(array, jnp.bfloat16) for array in normal]
    exact = [array.astype(jnp.float32) for array in half]  # of the rounded numbers, from which both start
    expected = _program(_xla, exact)(*exact)
    plain, chosen = _program(_xla, half), _program(dot_product.attention, half)
    errors = {name: _errors(program(*half), expected) for name, program in (("error", chosen), ("xla error", plain))}
    good = all(ours <= TOLERANCE * xla for ours, xla in zip(errors["error"], errors["xla error"], strict=True))
    forward = jax.jit(dot_product.attention)
    name = dot_product.choose(case)
    kernels = {name: count for name, count in grouped(count_kernels(chosen.as_text())).items() if count}
    return {
        "chosen": name,
        "fell back": name == "cudnn" and "cuDNN attention" not in kernels,
        "kernels": kernels,
        **errors,
        "good": good,
        "forward": timed(lambda: jax.block_until_ready(forward(*half[:3])))["median"],
        "forward and backward": timed(lambda: jax.block_until_ready(chosen(*half)))["median"],
        "xla forward and backward": timed(lambda: jax.block_until_ready(plain(*half)))["median"],
    }


def _xla(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention without any kernel: a mask of keys that are all seen is XLA's alone."""
    return dot_product.attention(q, k, v, keep=jnp.ones(k.shape[:2], bool))


def _program(attend: Callable[..., jax.Array], arrays: Sequence[jax.Array]) -> Any:
    """Compile values and gradients; the last array is the gradient of the output."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, pulled: jax.Array) -> Arrays:
        value, pull = jax.vjp(attend, q, k, v)
        return value, *pull(pulled)

    return jax.jit(both).lower(*arrays).compile()


def _errors(found: Arrays, expected: Arrays) -> list[float]:
    """Relative errors of the output and the gradients of q, k and v."""
    pairs = ((np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in zip(found, expected, strict=True))
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]
