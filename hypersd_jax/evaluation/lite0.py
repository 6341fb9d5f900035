"""EfficientNet-Lite0 features: a real ImageNet network, small enough to ship (arXiv 1905.11946, the "lite" variant).

ReLU6, no squeeze-and-excitation, batch norms folded into the convolutions. Distances in this feature space are called
"FID (EfficientNet-Lite0)": they say which of two models is closer, and compare with no Inception number.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from hypersd_jax.weights.components import assets

FEATURES = 1280
SMALL, NATIVE = 128, 224
# The strides of the 16 inverted bottlenecks; widths and kernel sizes are read off the kernels.
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)

Params = Mapping[str, jax.Array]


@functools.cache
def load_lite0() -> dict[str, np.ndarray]:
    """The weights that ship with the package, float32: kernels (h, w, in, out) and biases.

    Names are ``stem``, ``head`` and ``blocks.i.`` with ``expand``, ``depthwise`` and ``project``.
    """
    stored = load_file(assets() / "lite0" / "model.safetensors")
    return {name: value.astype(np.float32) for name, value in stored.items()}


def lite0(params: Params, images: jax.Array) -> jax.Array:
    """Pooled features (N, 1280), float32, of images (N, H, W, 3) in 0..255."""
    x = block_features(params, images, (len(STRIDES) - 1,))[0]
    return jnp.mean(_relu6(_conv(params, "head", x)), axis=(1, 2))


def block_features(params: Params, images: jax.Array, blocks: Sequence[int]) -> list[jax.Array]:
    """Compute the outputs (N, h, w, C) of blocks (ascending, 0..15), for images (N, H, W, 3) in 0..255."""
    x = (images.astype(jnp.float32) - 127.0) / 128.0
    x = _relu6(_conv(params, "stem", x, stride=2))
    found = []
    for index, stride in enumerate(STRIDES[: max(blocks) + 1]):
        name, before = f"blocks.{index}", x
        if f"{name}.expand.kernel" in params:
            x = _relu6(_conv(params, f"{name}.expand", x))
        x = _relu6(_conv(params, f"{name}.depthwise", x, stride=stride))
        x = _conv(params, f"{name}.project", x)
        if x.shape == before.shape:
            x = x + before
        if index in blocks:
            found.append(x)
    return found


def fitted(images: jax.Array, size: int | None = None) -> jax.Array:
    """Bring images (N, H, W, 3) in 0..255 to ``size``, bicubic; None: 128 px up to 128 px, else the native 224."""
    if size is None:
        size = SMALL if max(images.shape[1:3]) <= SMALL else NATIVE
    shape = (images.shape[0], size, size, images.shape[3])
    # Bicubic overshoots at edges; no image holds values outside 0..255.
    return jnp.clip(jax.image.resize(images.astype(jnp.float32), shape, "cubic"), 0.0, 255.0)


def features(images: np.ndarray, *, batch_size: int = 32, mesh: Mesh | None = None) -> np.ndarray:
    """Features (N, 1280), float32, of uint8 images or of float images in 0..1, (N, H, W, 3).

    Batches have one size, the last is filled up, so that one program serves any N. A ``mesh`` spreads each batch over
    its devices; ``batch_size`` must be a multiple of their number.

    Raises:
        ValueError: when ``images`` has another shape.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be (N, H, W, 3), not {images.shape}")
    scale = 1.0 if images.dtype == np.uint8 else 255.0
    rows = None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    params = jax.device_put(load_lite0(), None if mesh is None else NamedSharding(mesh, PartitionSpec()))
    found = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        batch = np.zeros((batch_size, *images.shape[1:]), np.float32)
        batch[: len(part)] = part * np.float32(scale)
        found.append(np.asarray(_extract(params, jax.device_put(batch, rows)))[: len(part)])
    return np.concatenate(found) if found else np.zeros((0, FEATURES), np.float32)


@jax.jit
def _extract(params: Params, images: jax.Array) -> jax.Array:
    return lite0(params, fitted(images))


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0.0, 6.0)


def _conv(params: Params, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    """A convolution with TensorFlow's SAME padding; depthwise where the kernel has one input channel."""
    kernel, bias = params[f"{name}.kernel"], params[f"{name}.bias"]
    if kernel.shape[2] == 1:
        y = _depthwise(x, kernel, stride)
    else:
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
    return y + bias[None, None, None, :]


def _depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Sum over the kernel's taps of shifted inputs: one fused loop, seven times faster on a CPU than a grouped one."""
    taps, (height, width) = kernel.shape[0], x.shape[1:3]
    rows, columns = -(-height // stride), -(-width // stride)
    pads = [max((out - 1) * stride + taps - size, 0) for out, size in ((rows, height), (columns, width))]
    x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))
    y = jnp.zeros((x.shape[0], rows, columns, x.shape[3]), x.dtype)
    for i in range(taps):
        for j in range(taps):
            shifted = x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
            y = y + shifted * kernel[i, j, 0][None, None, None, :]
    return y
