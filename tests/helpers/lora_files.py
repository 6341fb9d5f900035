"""Adapters with random factors, and their tensors as other programs would name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hypersd_jax.adapters import TARGETS_14, Adapter, target_paths

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def random_adapter(
    shapes: Mapping[str, Any], seed: int, *, rank: int = 4, scale: float = 1.0, targets: Sequence[str] = TARGETS_14
) -> Adapter:
    """A NumPy adapter for the modules of `shapes`, its delta about as large as the weights."""
    rng = np.random.default_rng(seed)
    adapter: Adapter = {}
    for path in target_paths(shapes, targets):
        *window, fan_out = shapes[path + ".kernel"].shape
        fan_in = int(np.prod(window))
        adapter[path] = {
            "down": (rng.normal(size=(*window, rank)) / fan_in**0.5).astype(np.float32),
            "up": (0.5 * rng.normal(size=(rank, fan_out)) / rank**0.5).astype(np.float32),
            "scale": np.full((rank,), scale, np.float32),
        }
    return adapter


def torch_factors(entry: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) as PyTorch stores them, without the scale."""
    down, up = entry["down"], entry["up"].T
    if down.ndim == 4:
        return np.ascontiguousarray(down.transpose(3, 2, 0, 1)), np.ascontiguousarray(up[:, :, None, None])
    return np.ascontiguousarray(down.T), np.ascontiguousarray(up)


def kohya_tensors(
    component_prefix: str, adapter: Adapter, alpha: float | None, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """The tensors of a kohya file, alpha as given (None: left out)."""
    tensors = {}
    for path, entry in adapter.items():
        name = component_prefix + path.replace(".", "_")
        down, up = torch_factors(entry)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down.astype(dtype), up.astype(dtype)
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, dtype)
    return tensors


def dotted_tensors(prefix: str, adapter: Adapter, down_suffix: str, up_suffix: str) -> dict[str, np.ndarray]:
    """The tensors of a PEFT or diffusers file."""
    tensors = {}
    for path, entry in adapter.items():
        tensors[f"{prefix}{path}{down_suffix}"], tensors[f"{prefix}{path}{up_suffix}"] = torch_factors(entry)
    return tensors


def assert_same_delta(ours: Adapter, expected: Adapter, tolerance: float = 1e-6) -> None:
    """Both adapt the same modules by the same amount."""
    assert ours.keys() == expected.keys()
    for path in expected:
        a, b = (
            np.asarray(entry["down"], np.float64) * entry["scale"] @ np.asarray(entry["up"], np.float64)
            for entry in (ours[path], expected[path])
        )
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-6), err_msg=path)
