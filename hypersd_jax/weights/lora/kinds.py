"""The kinds of LoRA modules, by their tensors: LoRA, LoHa, LoKr or a full difference, with or without DoRA.

Tensors are known by role here: `down`, `up`, `mid` of a LoRA, LyCORIS's own names for LoHa and LoKr, `full` and `bias`
of a plain difference, `alpha`, and DoRA's `magnitude`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from hypersd_jax.weights.lora.factors import fits, fold_mid, from_torch

Shape = tuple[int, ...]

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_TUCKER_LOHA = ("hada_t1", "hada_t2")
_LOKR_1, _LOKR_1_PAIR = ("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")
_LOKR_2, _LOKR_2_PAIR = ("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")
LOKR = (*_LOKR_1, *_LOKR_1_PAIR, *_LOKR_2, *_LOKR_2_PAIR, "lokr_t2")

_FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("LoRA", ("down", "up")),
    ("LoRA", ("down", "up", "mid")),
    ("LoHa", LOHA),
    ("LoHa", (*LOHA, *_TUCKER_LOHA)),
    ("LoKr", (*_LOKR_1, *_LOKR_2)),
    ("LoKr", (*_LOKR_1, *_LOKR_2_PAIR)),
    ("LoKr", (*_LOKR_1, *_LOKR_2_PAIR, "lokr_t2")),
    ("LoKr", (*_LOKR_1_PAIR, *_LOKR_2)),
    ("LoKr", (*_LOKR_1_PAIR, *_LOKR_2_PAIR)),
    ("LoKr", (*_LOKR_1_PAIR, *_LOKR_2_PAIR, "lokr_t2")),
    ("full", ("full",)),
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One module's kind.

    Attributes:
        name: "LoRA", "LoHa", "LoKr" or "full"; None where there is a bias alone.
        dora: whether it has a magnitude too.
        bias: whether it changes the bias too.
    """

    name: str | None
    dora: bool
    bias: bool

    def __str__(self) -> str:
        return f"{self.name or 'full'}{' with DoRA' if self.dora else ''}"

    @property
    def is_adapter(self) -> bool:
        """Whether its weight's change is a pair of factors, applied in the forward pass."""
        return self.name == "LoRA" and not self.dora


def kind_of(roles: Collection[str]) -> Kind | None:
    """The kind that these roles make; None where one is missing or they mix kinds."""
    core = set(roles) - {"alpha", "magnitude", "bias"}
    name = next((name for name, form in _FORMS if core == set(form)), None)
    if name is None and (core or "bias" not in roles or "magnitude" in roles):
        return None
    return Kind(name=name, dora="magnitude" in roles, bias="bias" in roles)


def rank_of(shapes: Mapping[str, Shape]) -> int | None:
    """The rank that alpha is divided by; None where alpha means nothing: a full difference, a LoKr of full factors.

    As LyCORIS and ComfyUI read LoKr, the second factor's rank goes before the first's.
    """
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in shapes:
            return shapes[role][0] if shapes[role] else 0
    return None


def fits_weight(kind: Kind, shapes: Mapping[str, Shape], weight: Shape) -> bool:
    """Tell whether tensors of these shapes belong to a base weight of this shape, from the header alone."""
    return (
        (kind.name is None or _fits_core(kind.name, shapes, weight))
        and (not kind.dora or _magnitude_axis(shapes["magnitude"], weight) is not None)
        and (not kind.bias or math.prod(shapes["bias"]) == weight[-1])
    )


def _fits_core(name: str, shapes: Mapping[str, Shape], weight: Shape) -> bool:
    if name == "LoRA":
        return fits(shapes["down"], shapes["up"], weight, shapes.get("mid"))
    if name == "full":
        return _squeezed(shapes["full"]) == _squeezed(_torch_shape(weight))
    if any(len(shapes[role]) < 2 for role in shapes if role not in ("alpha", "magnitude", "bias")):
        return False
    *window, fan_in, fan_out = weight
    if name == "LoHa":
        return all(_fits_half(shapes, half, fan_in, fan_out, window) for half in (1, 2))
    return _fits_kronecker(shapes, fan_in, fan_out, math.prod(window))


def _fits_half(shapes: Mapping[str, Shape], half: int, fan_in: int, fan_out: int, window: list[int]) -> bool:
    a, b = shapes[f"hada_w{half}_a"], shapes[f"hada_w{half}_b"]
    rank = b[0]
    if f"hada_t{half}" in shapes:
        return rank > 0 and (a, b, shapes[f"hada_t{half}"]) == ((rank, fan_out), (rank, fan_in), (rank, rank, *window))
    return (
        rank > 0
        and a[:2] == (fan_out, rank)
        and math.prod(a) == fan_out * rank
        and (math.prod(b[1:]) == fan_in * math.prod(window))
    )


def _fits_kronecker(shapes: Mapping[str, Shape], fan_in: int, fan_out: int, taps: int) -> bool:
    matrices = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", *(("lokr_w2_b",) if "lokr_t2" in shapes else ()))
    if any(len(shapes[role]) != 2 for role in matrices if role in shapes):
        return False
    if any(0 in shape for shape in (shapes[role] for role in LOKR if role in shapes)):
        return False
    out_1, in_1 = shapes["lokr_w1"] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    if "lokr_w1_a" in shapes and shapes["lokr_w1_a"][1] != shapes["lokr_w1_b"][0]:
        return False
    if "lokr_w2" in shapes:
        out_2, rest_2 = shapes["lokr_w2"][0], math.prod(shapes["lokr_w2"][1:])
    else:
        a, b = shapes["lokr_w2_a"], shapes["lokr_w2_b"]
        tucker = shapes.get("lokr_t2")
        if tucker is not None:
            if len(tucker) != 4 or tucker[:2] != (a[0], b[0]) or math.prod(tucker[2:]) != taps:
                return False
            out_2, rest_2 = a[1], b[1] * taps
        else:
            if a[1] != b[0]:
                return False
            out_2, rest_2 = a[0], math.prod(b[1:])
    return out_1 * out_2 == fan_out and in_1 * rest_2 == fan_in * taps and rest_2 % taps == 0


def decode(kind: Kind, tensors: Mapping[str, np.ndarray], weight: Shape) -> dict[str, np.ndarray]:
    """The tensors of a kind that `fits_weight`, in our layout, float32, without scale.

    Tucker's middle factors are folded into the down factors, and LoKr's decomposed factors multiplied out, exactly but
    for rounding.
    """
    values = {role: np.asarray(tensor, np.float32) for role, tensor in tensors.items()}
    entry: dict[str, np.ndarray] = {}
    if kind.name == "LoRA":
        down = fold_mid(values["down"], values["mid"]) if "mid" in values else values["down"]
        entry["down"], entry["up"] = from_torch(down, values["up"], weight)
    elif kind.name == "LoHa":
        entry["down"], entry["up"] = _hadamard_half(values, 1, weight)
        entry["down_2"], entry["up_2"] = _hadamard_half(values, 2, weight)
    elif kind.name == "LoKr":
        entry["left"], entry["right"] = _kronecker_factors(values, weight)
    elif kind.name == "full":
        entry["full"] = _from_torch_weight(values["full"].reshape(_torch_shape(weight)))
    if kind.bias:
        entry["bias"] = values["bias"].reshape(-1)
    if kind.dora:
        axis = _magnitude_axis(values["magnitude"].shape, weight)
        shape = [1] * len(weight)
        shape[-1 if axis is None else axis] = -1
        entry["magnitude"] = values["magnitude"].reshape(shape)
    return {name: np.ascontiguousarray(value) for name, value in entry.items()}


def _hadamard_half(values: Mapping[str, np.ndarray], half: int, weight: Shape) -> tuple[np.ndarray, np.ndarray]:
    a, b = values[f"hada_w{half}_a"], values[f"hada_w{half}_b"]
    middle = values.get(f"hada_t{half}")
    if middle is not None:
        return from_torch(fold_mid(b, middle), a.T, weight)
    fan_in, window = weight[-2], weight[:-2] or (1, 1)
    return from_torch(b.reshape(b.shape[0], fan_in, *window), a.reshape(a.shape[:2]), weight)


def _kronecker_factors(values: Mapping[str, np.ndarray], weight: Shape) -> tuple[np.ndarray, np.ndarray]:
    left = values["lokr_w1"] if "lokr_w1" in values else values["lokr_w1_a"] @ values["lokr_w1_b"]
    window = weight[:-2]
    if "lokr_w2" in values:
        right = values["lokr_w2"]
    elif "lokr_t2" in values:
        right = np.einsum("pqkl,po,qi->oikl", values["lokr_t2"], values["lokr_w2_a"], values["lokr_w2_b"])
    else:
        b = values["lokr_w2_b"]
        right = values["lokr_w2_a"] @ b.reshape(b.shape[0], -1)
    right = right.reshape(right.shape[0], -1, *window)
    return left.T, _from_torch_weight(right)


def _magnitude_axis(shape: Shape, weight: Shape) -> int | None:
    """The axis of our weight that a magnitude runs along: -1 outputs, -2 inputs; None where it fits neither.

    Both libraries write one number for each output: (out, 1, ...) in LyCORIS, (out,) in PEFT, whose convolutions'
    (1, out, 1, 1) is flattened before this is asked. LyCORIS before `wd_on_out` wrote (1, in, ...).
    """
    if shape and shape[0] == math.prod(shape) == weight[-1]:
        return -1
    if len(weight) > 1 and len(shape) > 1 and shape[0] == 1 and shape[1] == math.prod(shape) == weight[-2]:
        return -2
    return None


def _torch_shape(weight: Shape) -> Shape:
    return (weight[-1], weight[-2], *weight[:-2]) if len(weight) > 1 else weight


def _from_torch_weight(value: np.ndarray) -> np.ndarray:
    """(out, in, kh, kw) or (out, in) or (out,) in our layout."""
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _squeezed(shape: Shape) -> Shape:
    """A Linear's weight as a 1x1 convolution's and the other way round."""
    return shape[:2] if shape[2:] == (1, 1) else shape
