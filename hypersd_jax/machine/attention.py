"""The attention kernels that the models' longest sequences would run on here, each tried once against XLA's."""

from __future__ import annotations

from typing import Any

SHAPES: dict[str, tuple[int, int]] = {
    "SD 1.5, 512 px, outer blocks": (4096, 40),
    "SD 1.5, 512 px, next blocks": (1024, 80),
    "SDXL, 1024 px, outer blocks": (4096, 64),
    "SDXL, 1024 px, inner blocks": (1024, 64),
    "decoder, 512 px": (4096, 512),
    "decoder, 1024 px": (16384, 512),
}
"""Tokens and width of a head: the two longest self-attentions of each UNet, and the decoders'."""
TRIED = 1024
"""Tokens of the trial, the fewest that the special kernels take."""


def kernels() -> dict[str, Any]:
    """Choose the kernel of each of `SHAPES` in the default type, and try each kernel at each width it was chosen for.

    Returns:
        "dtype", "chosen" (kernel by shape), "tried": {"KERNEL, width N": {"difference": the largest from XLA's result
        in the same type, of numbers of about 0.05} or {"refused": the library's first line}}.
    """
    import jax
    import jax.numpy as jnp

    from hypersd_jax.models.dot_product import Case, choose
    from hypersd_jax.weights.components import default_dtype

    dtype = str(jnp.dtype(default_dtype()))
    chosen, tried = {}, {}
    for name, (tokens, width) in SHAPES.items():
        case = Case(platform=jax.default_backend(), dtype=dtype, queries=tokens, keys=tokens, width=width, causal=False)
        kernel = chosen[name] = choose(case)
        tried[f"{kernel}, width {width}"] = (kernel, width)
    found = {label: try_kernel(*each, dtype=dtype) for label, each in tried.items() if each[0] != "xla"}
    return {"dtype": dtype, "chosen": chosen, "tried": found}


def try_kernel(name: str, width: int, *, dtype: str) -> dict[str, Any]:
    """Attend once over `TRIED` tokens of one head by a kernel and by XLA.

    Args:
        name: the kernel, of `models.dot_product.KERNELS`.
        width: of the head.
        dtype: of queries, keys and values.

    Returns:
        {"difference": the largest} or {"refused": why}, where the kernel's library does not run it here.
    """
    import jax
    import numpy as np

    from hypersd_jax.models.dot_product import KERNELS

    by_name = {each: run for each, _, run in KERNELS}
    values = np.random.default_rng(0).standard_normal((3, 1, TRIED, 1, width), np.float32)
    q, k, v = (jax.numpy.asarray(value, dtype) for value in values)
    wanted = np.asarray(by_name["xla"](q, k, v, causal=False), np.float32)
    try:
        result = np.asarray(by_name[name](q, k, v, causal=False), np.float32)
    except Exception as error:
        return {"refused": (str(error).splitlines() or [type(error).__name__])[0]}
    found = float(np.abs(result - wanted).max())
    return {"difference": found} if np.isfinite(found) else {"refused": "its result is not finite"}
