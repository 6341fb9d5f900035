"""PyTorch parameters in our layout, by the generic rule of names and ranks; for parity tests only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch


def perturb(module: torch.nn.Module, seed: int, amount: float = 0.2) -> torch.nn.Module:
    """Add seeded noise to all parameters, so that norms, biases and zero initialisations all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = amount if parameter.ndim == 1 else amount * float(parameter.std())
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return module.eval()


def to_ours(path: str, tensor: Any) -> np.ndarray:
    """Transpose one tensor to the layout of our leaf `path`: Linear (out, in) -> (in, out), Conv OIHW -> HWIO."""
    array = np.asarray(tensor.detach().float().cpu().numpy() if isinstance(tensor, torch.Tensor) else tensor)
    if path.endswith(".kernel"):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array


def torch_name(path: str) -> str:
    """Name the PyTorch parameter that our leaf `path` holds."""
    stem, leaf = path.rsplit(".", 1)
    return f"{stem}.{'bias' if leaf == 'bias' else 'weight'}"


def params_from_torch(module: torch.nn.Module, shapes: Mapping[str, Any], *, grads: bool = False) -> dict[str, Any]:
    """Read every parameter of `shapes` from `module` (or its gradient), checking names and shapes both ways."""
    theirs = {name: p.grad if grads else p for name, p in module.named_parameters()}
    wanted = {torch_name(path): path for path in shapes}
    assert set(wanted) == set(theirs), sorted(set(wanted) ^ set(theirs))[:10]
    params = {path: jnp.asarray(to_ours(path, theirs[name])) for name, path in wanted.items()}
    for path, leaf in params.items():
        assert leaf.shape == shapes[path].shape, path
    return params


def relative_error(ours: Any, theirs: Any) -> float:
    """Relative L2 error of `ours` against `theirs`."""
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64) for x in (ours, theirs))
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
