"""Discriminator heads against the same layers in PyTorch: values and all gradients, in float32."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypersd_jax.models import patch_heads, pooled_heads
from tests.helpers.quick import quick_jit
from tests.helpers.torch_weights import params_from_torch, perturb, relative_error

# Channels, groups, height, width.
TAPS = {"down_blocks.0": (12, 3, 9, 7), "mid_block": (128, 32, 5, 4), "up_blocks.1": (7, 1, 4, 6)}


class PatchHead(torch.nn.Module):
    """PCM's head; its leaky ReLU has PyTorch's default slope."""

    def __init__(self, channels: int, groups: int, size: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, channels, size, padding="same")
        self.norm1 = torch.nn.GroupNorm(groups, channels)
        self.conv2 = torch.nn.Conv2d(channels, channels, size, padding="same")
        self.norm2 = torch.nn.GroupNorm(groups, channels)
        self.conv_out = torch.nn.Conv2d(channels, 1, 1)
        self.act = torch.nn.LeakyReLU()

    def forward(self, x: Any) -> Any:
        x = self.act(self.norm1(self.conv1(x)))
        return self.conv_out(x + self.act(self.norm2(self.conv2(x))))


class PooledHead(torch.nn.Module):
    """DMD2's head, up to the map that it pools."""

    def __init__(self, channels: int, groups: int, downsamples: int) -> None:
        super().__init__()
        conv = [torch.nn.Conv2d(channels, channels, kernel_size=4, stride=2, padding=1) for _ in range(downsamples)]
        self.convs = torch.nn.ModuleList(conv)
        self.norms = torch.nn.ModuleList([torch.nn.GroupNorm(groups, channels) for _ in range(downsamples)])
        self.conv_out = torch.nn.Conv2d(channels, 1, 1)

    def forward(self, x: Any) -> Any:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.nn.functional.silu(norm(conv(x)))
        return self.conv_out(x)


class Heads(torch.nn.Module):
    """One head a tap."""

    def __init__(self, head: type, number: int) -> None:
        super().__init__()
        made = {tap.replace(".", "_"): head(c, groups, number) for tap, (c, groups, _, _) in TAPS.items()}
        self.heads = torch.nn.ModuleDict(made)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        heads = zip(features.items(), self.heads.values(), strict=True)
        return {tap: head(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for (tap, x), head in heads}


@pytest.mark.parametrize(("head", "number"), [(PatchHead, 1), (PatchHead, 3), (PooledHead, 1), (PooledHead, 2)])
def test_values_and_gradients(head: type, number: int) -> None:
    torch.manual_seed(0)
    theirs = perturb(Heads(head, number), seed=1)
    channels = {tap: c for tap, (c, _, _, _) in TAPS.items()}
    network = patch_heads(channels, size=number) if head is PatchHead else pooled_heads(channels, downsamples=number)
    params = params_from_torch(theirs, network.shapes)
    random = np.random.default_rng(number)
    given = {tap: random.standard_normal((2, h, w, c)).astype(np.float32) for tap, (c, _, h, w) in TAPS.items()}

    tensors = {tap: torch.tensor(array, requires_grad=True) for tap, array in given.items()}
    wanted = theirs(tensors)
    cotangent = {tap: random.standard_normal(out.shape).astype(np.float32) for tap, out in wanted.items()}
    sum((out * torch.tensor(cotangent[tap])).sum() for tap, out in wanted.items()).backward()

    @quick_jit
    def ours(params: Any, given: Any) -> Any:
        value, back = jax.vjp(network, params, given)
        return value, back(cotangent)

    value, (params_grad, given_grad) = ours(params, given)
    for tap in TAPS:
        assert relative_error(value[tap], wanted[tap]) < 1e-5, tap
        assert relative_error(given_grad[tap], tensors[tap].grad) < 1e-5, tap
    theirs_grad = params_from_torch(theirs, network.shapes, grads=True)
    for tap in TAPS:
        leaves = {path: leaf for path, leaf in theirs_grad.items() if f".{tap.replace('.', '_')}." in path}
        total = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in leaves.values()))
        for path, leaf in leaves.items():
            # A leaf whose gradient is nearly nothing (a bias before a norm) is held against its whole head.
            scale = max(float(np.linalg.norm(leaf)), 1e-2 * total)
            assert float(np.linalg.norm(params_grad[path] - leaf)) < 1e-5 * scale, path
