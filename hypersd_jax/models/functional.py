"""Networks as pure functions of a flat parameter dictionary.

An NNX module is built once, abstractly, into a graph definition and the shapes of its parameters. From then on a
network is `network(params, *args, adapter=None)` where `params` maps dotted paths to arrays, so that `jax.jit`,
`jax.grad`, sharding, optimizers and files all see plain dictionaries. The module is put together again inside the trace
(`nnx.merge`), which is where an adapter is attached: one graph definition serves the bare network and every LoRA.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from hypersd_jax.adapters import attach

Params = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]

WINOGRAD = ".winograd"
"""What follows a kernel's path to name its transformed form, see `models.prepared`."""


def dotted(path: tuple[Any, ...]) -> str:
    """Spell an NNX path, e.g. `("down_blocks", 0, "conv_in", "kernel")`, as `down_blocks.0.conv_in.kernel`."""
    return ".".join(str(part) for part in path)


def undotted(path: str) -> tuple[str | int, ...]:
    """Invert `dotted`: parts made of digits index an `nnx.List`."""
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A module's graph definition and parameter shapes; compared and hashed by identity.

    Attributes:
        graphdef: static structure of the module.
        shapes: abstract value of every parameter by dotted path.
    """

    graphdef: nnx.GraphDef
    shapes: Shapes

    def __call__(
        self, params: Mapping[str, Any], *args: Any, adapter: Any = None, method: str = "__call__", **kwargs: Any
    ) -> Any:
        """Run `method` of the module with these parameters; `adapter` adds LoRA terms (`hypersd_jax.adapters`)."""
        module = self.module(params)
        if adapter is not None:
            attach(module, adapter)
        return getattr(module, method)(*args, **kwargs)

    def module(self, params: Mapping[str, Any]) -> nnx.Module:
        """Put the module together around `params`; KeyError unless they have exactly the paths of `shapes`.

        Transformed kernels may stand beside them, and go to the layers whose kernels they are.
        """
        transformed = {path for path in params if path.endswith(WINOGRAD)}
        if odd := sorted((params.keys() - transformed) ^ self.shapes.keys()):
            raise KeyError(f"parameters do not match the network: {odd[0]} and {len(odd) - 1} others")
        flat = [(undotted(path), params[path]) for path in self.shapes]
        module: nnx.Module = nnx.merge(self.graphdef, nnx.from_flat_state(flat))
        for path in transformed:
            *parts, _ = undotted(path.removesuffix(WINOGRAD))
            layer: Any = module
            for part in parts:
                layer = layer[part] if isinstance(part, int) else getattr(layer, part)
            layer.transformed = nnx.data(params[path])
        return module

    def init(self, seed: int, *, gain: float = 1.0) -> Params:
        """Generate random parameters, with biases of zero.

        Each leaf depends on (seed, path) alone, not on the device. Kernels are uniform within +-gain/sqrt(fan in),
        norms the identity, embeddings and all else N(0, 0.02). A gain of 1 is PyTorch's; with sqrt(3) a kernel keeps
        the variance of its input (LeCun et al., Efficient BackProp, section 4.6).
        """
        # `jnp.asarray` would compile a program for every shape.
        return {path: jax.device_put(_generate(seed, path, leaf, gain)) for path, leaf in self.shapes.items()}


def _generate(seed: int, path: str, leaf: jax.ShapeDtypeStruct, gain: float) -> np.ndarray:
    """Generate on the host: compiling one device program for some hundred shapes would take longer than using it."""
    name = path.rpartition(".")[2]
    if name in ("bias", "scale"):
        return np.full(leaf.shape, name == "scale", leaf.dtype)
    random = np.random.default_rng([seed, zlib.crc32(path.encode())])
    if name == "kernel":
        bound = gain * math.prod(leaf.shape[:-1]) ** -0.5
        return ((2 * random.random(leaf.shape, np.float32) - 1) * bound).astype(leaf.dtype)
    return (0.02 * random.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)


def build(make: Callable[[], nnx.Module]) -> Network:
    """Take apart the module that `make` builds of abstract parameters (`layers.parameter`) into a `Network`."""
    graphdef, state = nnx.split(make())
    shapes = {dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}
    return Network(graphdef=graphdef, shapes=shapes)


@functools.lru_cache(maxsize=64)
def describe(kind: Callable[..., nnx.Module], *args: Hashable, **kwargs: Hashable) -> Network:
    """Build the network of a module class; equal arguments give one and the same network.

    NNX takes up to a second to put a large UNet together, and one model is opened, converted and measured in turn.
    """
    return build(functools.partial(kind, *args, **kwargs))
