"""The CLIP score (Hessel et al. 2021, arXiv:2104.08718): how well an image fits its prompt, by a CLIP.

100 times the cosine between the embeddings of image and prompt, some 20 to 35 for images that fit. torchmetrics'
`CLIPScore` is the mean of these, and 0 where the mean is negative; a single score is not cut off at 0 there nor here,
where it would stop gradients.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hypersd_jax.conditioning import PromptEncoder, load_tokenizer
from hypersd_jax.errors import UserError, shown
from hypersd_jax.models.clip_text import LEGACY_EOS
from hypersd_jax.models.functional import Network
from hypersd_jax.rewards.preprocess import ImageSteps, preprocess
from hypersd_jax.weights.diffusers.clip import LoadedClip, load_clip_model

SCALE = 100.0
# Images that are scored together.
BATCH = 32
# By how much an image's values may lie outside 0..1.
SLACK = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipModel:
    """Both towers of a CLIP and the preprocessing of images: its static part under `jax.jit`."""

    vision: Network
    text: Network
    steps: ImageSteps


def embed_images(model: ClipModel, params: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
    """Embed images (B, H, W, 3), uint8 or floats in 0..1, as unit vectors (B, P) float32."""
    seen = model.vision(_part(model.vision, params), preprocess(images, model.steps))
    return _unit(seen.projected)


def embed_texts(model: ClipModel, params: Mapping[str, jax.Array], ids: jax.Array) -> jax.Array:
    """Embed token ids (B, S) as unit vectors (B, P) float32."""
    return _unit(model.text(_part(model.text, params), ids).pooled)


def clip_scores(model: ClipModel, params: Mapping[str, jax.Array], images: jax.Array, ids: jax.Array) -> jax.Array:
    """Compute CLIP scores (B,), float32, each of one image and one prompt; pure, differentiable in the images.

    Args:
        model: static structure.
        params: of both towers, `LoadedClip.params`.
        images: (B, H, W, 3), uint8 or floats in 0..1 of any height and width.
        ids: token ids (B, S), see `ClipScore.tokenize`.
    """
    return SCALE * jnp.sum(embed_images(model, params, images) * embed_texts(model, params, ids), axis=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipScore:
    """A CLIP that scores images.

    Attributes:
        model: the first argument of `clip_scores`.
        params: the second one.
        prompts: tokenizes.
    """

    model: ClipModel
    params: Mapping[str, jax.Array]
    prompts: PromptEncoder

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids (B, S) int32; a prompt that does not fit is cut, with a warning, and keeps its end mark."""
        return self.prompts.tokenize(prompts)[0]

    def __call__(self, images: Any, prompts: Sequence[str]) -> np.ndarray:
        """CLIP scores (B,), float32.

        Args:
            images: (B, H, W, 3), uint8 or floats in 0..1; or a list of PIL images of one size.
            prompts: one text for each image.

        Raises:
            UserError: they are not of that form or not as many.
        """
        arrays, texts = _as_array(images), list(prompts)
        if isinstance(prompts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError("prompts must be a list of texts")
        if len(arrays) != len(texts):
            raise UserError(f"{len(arrays)} images, but {len(texts)} prompts")
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


def load_clip(path: str | os.PathLike[str]) -> ClipScore:
    """The CLIP score by a `CLIPModel` in transformers' layout, computed in float32.

    Args:
        path: see `load_clip_model`: OpenAI's B/32 and L/14, OpenCLIP's in transformers' names, or any other.

    Raises:
        UserError: one line naming the file or key that is missing, damaged, unsupported or fits nothing.
    """
    loaded = load_clip_model(path, dtype=jnp.float32)
    try:
        steps = ImageSteps.from_dict(loaded.image_processor, loaded.vision_config.image_size)
    except UserError as error:
        raise UserError(f"{loaded.origin}: {error}") from None
    return ClipScore(
        model=ClipModel(vision=loaded.vision, text=loaded.text, steps=steps),
        params=loaded.params,
        prompts=_prompt_encoder(loaded),
    )


def _prompt_encoder(loaded: LoadedClip) -> PromptEncoder:
    tokenizer, config = load_tokenizer(loaded.tokenizer), loaded.text_config
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{loaded.origin}: the tokenizer has {len(tokenizer)} tokens, but vocab_size is {config.vocab_size}"
        )
    if config.eos_token_id not in (LEGACY_EOS, tokenizer.eos_token_id):
        raise UserError(
            f"{loaded.origin}: eos_token_id={config.eos_token_id}, but the tokenizer ends with {tokenizer.eos_token_id}"
        )
    return PromptEncoder(
        names=("text",),
        tokenizers=(tokenizer,),
        networks=(loaded.text,),
        lengths=(config.max_position_embeddings,),
        penultimate=False,
    )


def _as_array(images: Any) -> np.ndarray:
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


def _part(network: Network, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: params[path] for path in network.shapes}


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))


_jitted = jax.jit(clip_scores, static_argnums=0)
