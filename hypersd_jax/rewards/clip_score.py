"""Rewards by a CLIP that compares image and prompt: the CLIP score, PickScore, HPSv2.

All are the cosine between the embeddings of image and prompt, times a factor; they differ in weights, factor and
preprocessing.

| reward | factor | its scale |
|---|---|---|
| CLIP score (Hessel et al. 2021, arXiv:2104.08718) | 100 | some 20 to 35 for images that fit |
| PickScore (Kirstain et al. 2023, arXiv:2305.01569) | exp(logit_scale) of the file, 100 | some 20 to 23 |
| HPSv2, HPSv2.1 (Wu et al. 2023, arXiv:2306.09341) | 1 | some 0.2 to 0.35, other for each version |

torchmetrics' `CLIPScore` is the mean of the first, and 0 where the mean is negative; a single score is not cut off at 0
there nor here, where it would stop gradients.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.conditioning import PromptEncoder, load_tokenizer
from hypersd_jax.errors import UserError
from hypersd_jax.models.clip_text import LEGACY_EOS
from hypersd_jax.models.functional import Network
from hypersd_jax.rewards.preprocess import Fit, ImageSteps, crop, pad, preprocess
from hypersd_jax.rewards.reward import LoadedReward, part, unit, weights_path
from hypersd_jax.weights.diffusers.clip import LOGIT_SCALE, LoadedClip, LoadedVision, load_clip_model

SCALE = 100.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipModel:
    """Both towers of a CLIP and the preprocessing of images: its static part under `jax.jit`.

    Attributes:
        factor: what cosines are multiplied by; None: exp(logit_scale) of the parameters.
    """

    vision: Network
    text: Network
    steps: ImageSteps
    factor: float | None = SCALE

    def __call__(self, params: Mapping[str, jax.Array], images: jax.Array, ids: jax.Array) -> jax.Array:
        """Compute scores (B,) as `RewardModel` says."""
        return clip_scores(self, params, images, ids)


def embed_images(model: ClipModel, params: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
    """Embed images (B, H, W, 3), uint8 or floats in 0..1, as unit vectors (B, P) float32."""
    seen = model.vision(part(params, model.vision.shapes), preprocess(images, model.steps))
    return unit(seen.projected)


def embed_texts(model: ClipModel, params: Mapping[str, jax.Array], ids: jax.Array) -> jax.Array:
    """Embed token ids (B, S) as unit vectors (B, P) float32."""
    return unit(model.text(part(params, model.text.shapes), ids).pooled)


def clip_scores(model: ClipModel, params: Mapping[str, jax.Array], images: jax.Array, ids: jax.Array) -> jax.Array:
    """Compute scores (B,), float32, each of one image and one prompt; pure, differentiable in the images.

    Args:
        model: static structure.
        params: of both towers, `LoadedClip.params`.
        images: (B, H, W, 3), uint8 or floats in 0..1 of any height and width.
        ids: token ids (B, S), see `LoadedReward.tokenize`.
    """
    cosines = jnp.sum(embed_images(model, params, images) * embed_texts(model, params, ids), axis=-1)
    return cosines * (jnp.exp(params[LOGIT_SCALE]) if model.factor is None else model.factor)


def load_clip(path: str | os.PathLike[str]) -> LoadedReward:
    """The CLIP score by any CLIP, computed in float32.

    Args:
        path: see `load_clip_model`: OpenAI's B/32 and L/14, OpenCLIP's, or any other.

    Raises:
        UserError: one line naming the file or key that is missing, damaged, unsupported or fits nothing.
    """
    return _reward(load_clip_model(weights_path(path), dtype=jnp.float32), SCALE, crop)


def load_pickscore(path: str | os.PathLike[str]) -> LoadedReward:
    """PickScore, by the fine-tuned CLIP ViT-H/14 that its authors published (yuvalkirstain/PickScore_v1).

    Args:
        path: see `load_clip_model`.

    Raises:
        UserError: as `load_clip`.
    """
    return _reward(load_clip_model(weights_path(path), dtype=jnp.float32, activation="gelu"), None, crop)


def load_hpsv2(path: str | os.PathLike[str]) -> LoadedReward:
    """HPSv2 or HPSv2.1, whichever the weights are of; images are padded to squares, as in its own evaluation.

    Args:
        path: see `load_clip_model`: ``HPS_v2.1_compressed.pt`` after ``hypersd convert reward``, or the same CLIP
            ViT-H/14 in transformers' layout.

    Raises:
        UserError: as `load_clip`.
    """
    return _reward(load_clip_model(weights_path(path), dtype=jnp.float32, activation="gelu"), 1.0, pad)


def image_steps(loaded: LoadedClip | LoadedVision, size: int, fit: Fit) -> ImageSteps:
    """The preprocessing of images that a CLIP's folder asks for; UserError where it cannot be done."""
    try:
        return ImageSteps.from_dict(loaded.image_processor, size, fit)
    except UserError as error:
        raise UserError(f"{loaded.origin}: {error}") from None


def _reward(loaded: LoadedClip, factor: float | None, fit: Fit) -> LoadedReward:
    steps = image_steps(loaded, loaded.vision_config.image_size, fit)
    return LoadedReward(
        model=ClipModel(vision=loaded.vision, text=loaded.text, steps=steps, factor=factor),
        params=loaded.params,
        tokenize=Tokenize(prompts=_prompt_encoder(loaded)),
    )


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Turns texts into CLIP's token ids (B, S) int32; a prompt that does not fit is cut, with a warning."""

    prompts: PromptEncoder

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Each ends with its end mark, also where it was cut."""
        return self.prompts.tokenize(texts)[0]


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
