"""The floating-point operations of a function, counted from its trace: matrix products and convolutions.

These are what an accelerator's peak is of; norms, activations and the optimizer are left out. What nobody reads is not
counted, as the compiler removes it, and a scan counts as often as it runs. Unlike XLA's own estimate before it
compiles, which takes every loop for one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


class NotCounted(Exception):
    """The trace holds a loop of unknown length, or a kernel that cannot be looked into."""


def flops_of(function: Callable[..., Any], *args: Any, loop_steps: float = 0.0) -> float:
    """Trace a function of arrays, or of their shapes, and count its operations: two for each multiplication and sum.

    Of a branch the costlier side counts.

    Args:
        function: computes a tree of arrays, all of which are read.
        args: trees of arrays or `jax.ShapeDtypeStruct`s.
        loop_steps: how often a loop runs whose length depends on values.

    Raises:
        NotCounted: naming what stands in the way.
    """
    traced = jax.make_jaxpr(function)(*args)
    return _count(traced.jaxpr, [True] * len(traced.jaxpr.outvars), loop_steps)[0]


def _count(jaxpr: Jaxpr, read: Sequence[bool], loop_steps: float) -> tuple[float, list[bool]]:
    """Count what the ``read`` outputs need: (operations, which inputs are needed)."""
    needed = {var for var, is_read in zip(jaxpr.outvars, read, strict=True) if is_read and not isinstance(var, Literal)}
    total = 0.0
    for eqn in reversed(jaxpr.eqns):
        outputs = [var in needed for var in eqn.outvars]
        if not any(outputs) and not eqn.effects:
            continue
        operations, inputs = _of_one(eqn, outputs, loop_steps)
        total += operations
        needed |= {
            var for var, is_read in zip(eqn.invars, inputs, strict=True) if is_read and not isinstance(var, Literal)
        }
    return total, [var in needed for var in jaxpr.invars]


def _of_one(eqn: Any, read: list[bool], loop_steps: float) -> tuple[float, list[bool]]:
    name, everything = eqn.primitive.name, [True] * len(eqn.invars)
    if name == "dot_general":
        ((contracted, _), _) = eqn.params["dimension_numbers"]
        lengths = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * lengths, everything
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
        each = math.prod(kernel) / kernel[numbers.rhs_spec[0]]  # products for one number of the output
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * each, everything
    if name == "scan":
        return _scan(eqn, read, loop_steps)
    if name == "while":
        inner = eqn.params["body_jaxpr"].jaxpr
        once = _count(inner, [True] * len(inner.outvars), loop_steps)[0]
        if once and not loop_steps:
            raise NotCounted("a loop whose length is not known")
        return once * loop_steps, everything
    if name == "cond":
        sides = [_count(side.jaxpr, read, loop_steps) for side in eqn.params["branches"]]
        inputs = [any(flags) for flags in zip(*(flags for _, flags in sides), strict=True)]
        return max(operations for operations, _ in sides), [True, *inputs]
    if name == "pallas_call":
        raise NotCounted("a kernel that cannot be looked into")
    inners = [_opened(value) for value in eqn.params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]
    if len(inners) == 1 and len(inners[0].invars) == len(eqn.invars) and len(inners[0].outvars) == len(read):
        return _count(inners[0], read, loop_steps)
    return sum(_count(inner, [True] * len(inner.outvars), loop_steps)[0] for inner in inners), everything


def _scan(eqn: Any, read: list[bool], loop_steps: float) -> tuple[float, list[bool]]:
    """A carry is read where it is read at the end, or by the next pass."""
    inner, params = eqn.params["jaxpr"].jaxpr, eqn.params
    # Versions of JAX name these counts differently; what is scanned over has an axis more outside than inside.
    carried = len(read) - _scanned(eqn.outvars, inner.outvars)
    consts = len(inner.invars) - carried - _scanned(eqn.invars, inner.invars)
    carry, rest = read[:carried], read[carried:]
    while True:
        operations, inputs = _count(inner, [*carry, *rest], loop_steps)
        wider = [a or b for a, b in zip(carry, inputs[consts : consts + carried], strict=True)]
        if wider == carry:
            return operations * params["length"], inputs
        carry = wider


def _scanned(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(outer.aval.shape != inner.aval.shape for outer, inner in zip(outside, inside, strict=True))


def _opened(inner: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
