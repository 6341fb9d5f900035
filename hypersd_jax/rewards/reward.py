"""A loaded reward: a pure function of parameters, images and token ids, and the call that checks what it is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hypersd_jax.errors import UserError, shown
from hypersd_jax.paths import expanded
from hypersd_jax.weights.tensors import PICKLE_SUFFIXES

# Images that are scored together.
BATCH = 32
# By how much an image's values may lie outside 0..1.
SLACK = 1e-3


class RewardModel(Protocol):
    """The static part of a reward, hashable: its networks and its preprocessing of images."""

    def __call__(self, params: Mapping[str, jax.Array], images: jax.Array, ids: jax.Array) -> jax.Array:
        """Compute scores (B,), float32, each of one image and one prompt; pure, differentiable in the images.

        Args:
            params: `LoadedReward.params`.
            images: (B, H, W, 3), uint8 or floats in 0..1 of any height and width; floats outside are not cut off.
            ids: (B, S) int32, see `LoadedReward.tokenize`.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedReward:
    """A reward with its weights.

    Attributes:
        model: computes scores, to be traced.
        params: its first argument.
        tokenize: (texts) -> its last argument, (B, S) int32; S is 0 where prompts are not read.
    """

    model: RewardModel
    params: Mapping[str, jax.Array]
    tokenize: Callable[[Sequence[str]], np.ndarray]

    def __call__(self, images: Any, prompts: Sequence[str]) -> Any:
        """Compute scores (B,), float32, the higher the better.

        Args:
            images: (B, H, W, 3), uint8 or floats in 0..1; or a list of PIL images of one size; or, under `jax.grad` and
                `jax.jit`, such an array that is being traced, whose values are not checked.
            prompts: one text for each image.

        Returns:
            A NumPy array; an array of JAX where the images are traced.

        Raises:
            UserError: they are not of that form or not as many.
        """
        traced = isinstance(images, jax.core.Tracer)
        arrays, texts = images if traced else as_array(images), list(prompts)
        if isinstance(prompts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError("prompts must be a list of texts")
        if len(arrays) != len(texts):
            raise UserError(f"{len(arrays)} images, but {len(texts)} prompts")
        if traced:
            return _jitted(self.model, self.params, arrays, self.tokenize(texts))
        if not texts:
            return np.zeros((0,), np.float32)
        ids = self.tokenize(texts)
        # The last batch is filled up, so that one program serves all.
        batch = min(BATCH, len(texts))
        found = []
        for start in range(0, len(texts), batch):
            batch_indices = np.minimum(np.arange(start, start + batch), len(texts) - 1)
            found.append(np.asarray(_jitted(self.model, self.params, arrays[batch_indices], ids[batch_indices])))
        return np.concatenate(found)[: len(texts)]


def weights_path(path: str | os.PathLike[str]) -> Path:
    """The path of a reward's weights; UserError for a PyTorch file, and for a folder with weights in no other form."""
    path = expanded(Path(path))
    found = [path]
    if path.is_dir():
        found = [] if any(path.glob("*.safetensors")) else sorted(path.iterdir())
    for file in found:
        if file.suffix.lower() in PICKLE_SUFFIXES and file.is_file():
            raise UserError(
                f"{file}: a PyTorch file can run any code and is not loaded; "
                f"`hypersd convert reward {file} {file.with_suffix('.safetensors')}` makes it one that is"
            )
    return path


def no_tokens(texts: Sequence[str]) -> np.ndarray:
    """The token ids (B, 0) of a reward that reads images alone."""
    return np.zeros((len(texts), 0), np.int32)


def as_array(images: Any) -> np.ndarray:
    """Convert images to one array (B, H, W, 3); UserError for another shape, type or range of values."""
    if isinstance(images, Sequence) and all(isinstance(image, Image.Image) for image in images):
        if len({image.size for image in images}) > 1:
            raise UserError("images are of several sizes; score them apart")
        images = [np.asarray(image.convert("RGB")) for image in images] or np.zeros((0, 1, 1, 3), np.uint8)
    try:
        array = np.asarray(images)
    except ValueError:
        raise UserError("images are not a regular array of numbers") from None
    if array.ndim != 4 or array.shape[-1] != 3:
        raise UserError(f"images must be (B, H, W, 3), not {array.shape}")
    if array.dtype == np.uint8:
        return array
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"images must be uint8 or floats in 0..1, not of type {array.dtype}")
    if array.size and not (array.min() >= -SLACK and array.max() <= 1 + SLACK):
        raise UserError(f"images hold values from {shown(float(array.min()))} to {shown(float(array.max()))}, not 0..1")
    return array


def part(params: Mapping[str, jax.Array], paths: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The parameters of one network among those of several."""
    return {path: params[path] for path in paths}


def unit(x: jax.Array) -> jax.Array:
    """Vectors (..., D) at length 1, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def _score(model: RewardModel, params: Mapping[str, jax.Array], images: jax.Array, ids: jax.Array) -> jax.Array:
    return model(params, images, ids)


_jitted = jax.jit(_score, static_argnums=0)
