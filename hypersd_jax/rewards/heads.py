"""Heads that make one number of an embedding: layers in a row, multiplied out where nothing lies between them.

The product of affine maps is computed in float64 and rounded once; what is left is one dot product in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.errors import UserError
from hypersd_jax.models.functional import Params
from hypersd_jax.models.layers import precision_for
from hypersd_jax.weights.diffusers.component import read_finite, require_fit
from hypersd_jax.weights.tensors import TensorFile

HEAD = "head"
LEAVES = ("weight", "bias")

Layers = list[tuple[np.ndarray, np.ndarray]]
"""(weight (out, in), bias (out,)) pairs, float64."""


def apply_head(params: Mapping[str, jax.Array], x: jax.Array, layers: int) -> jax.Array:
    """Map embeddings (B, D) to numbers (B,), with ReLU between the layers; float32."""
    for index in range(layers):
        x = jax.nn.relu(x) if index else x
        x = jnp.matmul(x, params[f"{HEAD}.{index}.kernel"], precision=precision_for(x.dtype))
        x = x + params[f"{HEAD}.{index}.bias"][None]
    return x[:, 0]


def head_params(layers: Layers) -> Params:
    """The parameters of `apply_head`."""
    found: Params = {}
    for index, (weight, bias) in enumerate(layers):
        found[f"{HEAD}.{index}.kernel"] = jnp.asarray(weight.T, jnp.float32)
        found[f"{HEAD}.{index}.bias"] = jnp.asarray(bias, jnp.float32)
    return found


def read_layers(file: TensorFile, prefixes: Sequence[str]) -> Layers:
    """Read layers kept under these prefixes, in their order.

    Raises:
        UserError: a tensor is missing or holds NaN or infinity, or the layers are no chain that ends in one number.
    """
    keys = set(file.keys())
    require_fit(file.path, [key for prefix in prefixes for key in _names(prefix) if key not in keys], [], [])
    layers = []
    for prefix in prefixes:
        weight, bias = (read_finite(file, key).astype(np.float64) for key in _names(prefix))
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            shapes = f"{prefix}weight {list(weight.shape)} and {prefix}bias {list(bias.shape)}"
            raise UserError(f"{file.path}: {shapes} do not fit each other")
        layers.append((weight, bias))
    inputs, outputs = ([weight.shape[axis] for weight, _ in layers] for axis in (1, 0))
    if inputs[1:] != outputs[:-1] or outputs[-1] != 1:
        raise UserError(f"{file.path}: layers that read {inputs} numbers and give {outputs} are no chain to one")
    return layers


def collapsed(layers: Layers) -> Layers:
    """Affine maps in a row as one."""
    weight, bias = layers[0]
    for next_weight, next_bias in layers[1:]:
        weight, bias = next_weight @ weight, next_weight @ bias + next_bias
    return [(weight, bias)]


def _names(prefix: str) -> list[str]:
    return [f"{prefix}{leaf}" for leaf in LEAVES]
