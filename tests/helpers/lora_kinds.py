"""Tensors of each kind of LoRA module with random values, and the change of weights they stand for, from the formulas.

Everything here is PyTorch's layout, (out, in) or (out, in, kh, kw), and NumPy loops and products of the published
definitions, so that it shares nothing with what is tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

RANK = 3
ALPHA = 2.0

Tensors = dict[str, np.ndarray]

LOKR_FORMS = tuple(itertools.product(("whole", "pair"), ("whole", "pair", "tucker")))
KINDS = ("LoRA", "LoRA tucker", "LoHa", "LoHa tucker", *(f"LoKr {a} {b}" for a, b in LOKR_FORMS), "full")
"""Those that say "tucker" are of convolutions only."""


def is_for(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape can have this kind."""
    return "tucker" not in kind or len(shape) == 4


def random_kind(kind: str, shape: tuple[int, ...], seed: int) -> tuple[Tensors, np.ndarray]:
    """({suffix of a kohya key: tensor}, the change of the weight at strength 1, float64)."""
    rng = np.random.default_rng(seed)

    def draw(*size: int) -> np.ndarray:
        return (rng.normal(size=size) * 0.3).astype(np.float32)

    (out, fan_in, *window), alpha = shape, {"alpha": np.asarray(ALPHA, np.float32)}
    taps = int(np.prod(window))
    name, *form = kind.split()
    if kind == "full":
        tensors = {"diff": draw(*shape)}
        return tensors, tensors["diff"].astype(np.float64)
    if kind == "LoRA":
        ones = (1,) * len(window)
        tensors = {"lora_down.weight": draw(RANK, fan_in, *window), "lora_up.weight": draw(out, RANK, *ones)}
        return tensors | alpha, ALPHA / RANK * matrix(tensors["lora_up.weight"], tensors["lora_down.weight"], shape)
    if kind == "LoRA tucker":
        tensors = {
            "lora_down.weight": draw(RANK, fan_in, 1, 1),
            "lora_mid.weight": draw(RANK, RANK, *window),
            "lora_up.weight": draw(out, RANK, 1, 1),
        }
        down, mid, up = (tensor.astype(np.float64) for tensor in tensors.values())
        return tensors | alpha, ALPHA / RANK * tucker(mid, up[:, :, 0, 0].T, down[:, :, 0, 0])
    if name == "LoHa":
        if form:
            tensors = {f"hada_t{i}": draw(RANK, RANK, *window) for i in (1, 2)}
            tensors |= {f"hada_w{i}_a": draw(RANK, out) for i in (1, 2)}
            tensors |= {f"hada_w{i}_b": draw(RANK, fan_in) for i in (1, 2)}
            halves = [tucker(*(tensors[f"hada_{part}"] for part in (f"t{i}", f"w{i}_a", f"w{i}_b"))) for i in (1, 2)]
        else:
            tensors = {f"hada_w{i}_a": draw(out, RANK) for i in (1, 2)}
            tensors |= {f"hada_w{i}_b": draw(RANK, fan_in * taps) for i in (1, 2)}
            halves = [matrix(tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"], shape) for i in (1, 2)]
        return tensors | alpha, ALPHA / RANK * halves[0] * halves[1]
    return _lokr(draw, form[0], form[1], shape, alpha)


def _lokr(
    draw: Callable[..., np.ndarray], first: str, second: str, shape: tuple[int, ...], alpha: Tensors
) -> tuple[Tensors, np.ndarray]:
    out, fan_in, *window = shape
    taps = int(np.prod(window))
    (out_1, out_2), (in_1, in_2) = (2, out // 2), (4, fan_in // 4)
    tensors: Tensors = {}
    if first == "whole":
        w1 = tensors["lokr_w1"] = draw(out_1, in_1)
    else:
        tensors |= {"lokr_w1_a": draw(out_1, RANK), "lokr_w1_b": draw(RANK, in_1)}
        w1 = tensors["lokr_w1_a"].astype(np.float64) @ tensors["lokr_w1_b"]
    if second == "whole":
        w2 = tensors["lokr_w2"] = draw(out_2, in_2, *window)
    elif second == "pair":
        tensors |= {"lokr_w2_a": draw(out_2, RANK), "lokr_w2_b": draw(RANK, in_2 * taps)}
        w2 = matrix(tensors["lokr_w2_a"], tensors["lokr_w2_b"], (out_2, in_2, *window))
    else:
        tensors |= {
            "lokr_t2": draw(RANK, RANK, *window),
            "lokr_w2_a": draw(RANK, out_2),
            "lokr_w2_b": draw(RANK, in_2),
        }
        w2 = tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    change = np.kron(w1.astype(np.float64).reshape(out_1, in_1, *(1 for _ in window)), w2)
    return tensors | alpha, change * (1.0 if (first, second) == ("whole", "whole") else ALPHA / RANK)


def matrix(up: np.ndarray, down: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The plain product of two factors, as a weight."""
    return (up.astype(np.float64).reshape(shape[0], -1) @ down.reshape(down.shape[0], -1)).reshape(shape)


def tucker(core: np.ndarray, out_factor: np.ndarray, in_factor: np.ndarray) -> np.ndarray:
    """sum_ab core[a, b, k, l] out_factor[a, o] in_factor[b, i], a sum over the window's taps of matrix products."""
    change = np.zeros((out_factor.shape[1], in_factor.shape[1], *core.shape[2:]))
    for k, tap in itertools.product(*map(range, core.shape[2:])):
        change[:, :, k, tap] = out_factor.T.astype(np.float64) @ core[:, :, k, tap] @ in_factor
    return change


def dora(weight: np.ndarray, change: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Equation 5 of arXiv 2402.09353: magnitude (out, 1, ...) or (1, in, ...) times the merged weight's directions."""
    merged = weight.astype(np.float64) + change
    axes = tuple(axis for axis, length in enumerate(magnitude.shape) if length == 1)
    return magnitude * merged / np.sqrt((merged**2).sum(axis=axes, keepdims=True))


def ours(weight: np.ndarray) -> np.ndarray:
    """A weight of PyTorch's layout in ours."""
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
