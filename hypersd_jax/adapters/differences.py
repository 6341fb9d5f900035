"""Changes of weights that no pair of factors adds in the forward pass: LoHa, LoKr, DoRA and full differences.

They are written into the weights. A tree of them is a flat dict ``{dotted module path: entry}`` like an adapter's; an
entry holds float32 arrays in our layout: `scale` (), the file's own strength (alpha / r), and what makes the change,

    LoHa   down, up and down_2, up_2             delta = scale (down up) * (down_2 up_2)      elementwise (2108.06098)
    LoKr   left (in1, out1), right (.., in2, out2)   delta = scale left (x) right             Kronecker (2309.14859)
    full   full, of the weight's shape           delta = scale full
    LoRA   down (.., in, r), up (r, out)         delta = scale down up                        beside `magnitude` only
    DoRA   magnitude, any of these beside it     W' = magnitude (W + delta) / |W + delta|     (2402.09353, equation 5)

or `bias` (out,), added to the module's bias. `magnitude` has the weight's rank and length 1 along the axes that the
norm is taken over: one number for each output in PEFT and LyCORIS, one for each input in older LyCORIS files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from hypersd_jax.adapters.lora import Array

Entry = Mapping[str, Array]
Differences = Mapping[str, Entry]
Params = dict[str, jax.Array]


def altered(params: Mapping[str, jax.Array], stack: Sequence[tuple[Differences, float]]) -> Params:
    """The parameters that differences change, and nothing else: ``{**params, **altered(params, stack)}`` is the model.

    Each difference is taken of the base's own weights, W + sum_i scale_i (W'_i - W), so their order does not matter:
    PEFT's forward pass does the same with several DoRAs. `scale` goes from the base (0) straight to the file's weights
    (1). Sums are float32, rounded once to the weight's dtype.

    Args:
        params: one component's base parameters.
        stack: differences and the user's scale of each.

    Raises:
        KeyError: a difference names a module or bias that `params` does not hold.
    """
    parts: dict[str, list[tuple[Entry, float]]] = {}
    for differences, scale in stack:
        for path, entry in differences.items():
            if entry.keys() - {"scale", "bias"}:
                parts.setdefault(_weight_name(params, path), []).append((entry, scale))
            if "bias" in entry:
                parts.setdefault(path + ".bias", []).append(({"scale": entry["scale"], "full": entry["bias"]}, scale))
    changed = {}
    for name, entries in parts.items():
        if name not in params:
            raise KeyError(f"{name}: the model has no such parameter")
        weight = params[name]
        scales = jnp.asarray([scale for _, scale in entries], jnp.float32)
        bare = [{key: value for key, value in entry.items() if key != "bias"} for entry, _ in entries]
        changed[name] = jax.device_put(_altered(weight, bare, scales), weight.sharding)
    return changed


def difference_delta(entry: Entry) -> jax.Array:
    """Compute what an entry adds to its weight before any magnitude is applied: float32, in the weight's layout."""
    values = {name: jnp.asarray(value, jnp.float32) for name, value in entry.items()}
    if "full" in values:
        delta = values["full"]
    elif "left" in values:
        delta = _kronecker(values["left"], values["right"])
    else:
        delta = _product(values["down"], values["up"])
        if "down_2" in values:
            delta = delta * _product(values["down_2"], values["up_2"])
    return values["scale"] * delta


@jax.jit
def _altered(weight: jax.Array, entries: Sequence[Entry], scales: jax.Array) -> jax.Array:
    base = weight.astype(jnp.float32)
    total = base
    for entry, scale in zip(entries, scales, strict=True):
        total = total + scale * _change(base, entry)
    return total.astype(weight.dtype)


def _change(weight: jax.Array, entry: Entry) -> jax.Array:
    """W' - W of one entry at the file's own strength."""
    delta = difference_delta(entry)
    if "magnitude" not in entry:
        return delta
    merged = weight + delta
    magnitude = jnp.asarray(entry["magnitude"], jnp.float32)
    axes = tuple(axis for axis, length in enumerate(magnitude.shape) if length == 1)
    norm = jnp.sqrt(jnp.sum(merged**2, axis=axes, keepdims=True))
    return merged * jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 0) - weight


def _product(down: jax.Array, up: jax.Array) -> jax.Array:
    return lax.dot_general(down, up, (((down.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _kronecker(left: jax.Array, right: jax.Array) -> jax.Array:
    """Kronecker product of (in1, out1) and (..., in2, out2): (..., in1 in2, out1 out2)."""
    blocks = jnp.einsum("ab,...cd->...acbd", left, right, precision=lax.Precision.HIGHEST)
    *window, in_1, in_2, out_1, out_2 = blocks.shape
    return blocks.reshape(*window, in_1 * in_2, out_1 * out_2)


def _weight_name(params: Mapping[str, jax.Array], path: str) -> str:
    """A norm calls its weight `scale`, every other module `kernel`."""
    return path + (".scale" if path + ".scale" in params else ".kernel")
