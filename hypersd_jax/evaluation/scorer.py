"""Two small text-image scorers for the embedded images, each a dual encoder on frozen EfficientNet-Lite0 features.

``report`` reads pooled features and words in their order; ``reward`` reads middle layers and a bag of letter groups.
They share no trained weight, seed, layer read or text reading, so that what is trained to please one is measured by the
other; the frozen network beneath is the same.
Their card.json says how well they match text they were not trained to match; neither is a CLIP score.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import text_towers
from hypersd_jax.evaluation.lite0 import FEATURES, SMALL, block_features, fitted, lite0, load_lite0
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.tensors import open_tensors

ScorerName = Literal["report", "reward"]
Params = Mapping[str, Any]

SCALE = 100.0
"""Scores are cosines times this, as CLIP scores are printed."""

THUMBNAIL = 4
# Layers of the reward scorer: strides 8 and 16, 40 and 112 channels, each pooled by mean and by maximum.
MIDDLE_BLOCKS = (4, 10)
MIDDLE_FEATURES = 2 * (40 + 112)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerSpec:
    """The shape of a scorer: what it sees with, what it reads with, and the widths of both towers."""

    image_tower: Literal["pooled", "middle"]
    text_tower: Literal["words", "letters"]
    hidden: int
    width: int

    @property
    def image_width(self) -> int:
        """Number of values that the frozen network gives the image tower."""
        return FEATURES + 3 * THUMBNAIL**2 if self.image_tower == "pooled" else MIDDLE_FEATURES


SPECS: dict[ScorerName, ScorerSpec] = {
    "report": ScorerSpec(image_tower="pooled", text_tower="words", hidden=512, width=256),
    "reward": ScorerSpec(image_tower="middle", text_tower="letters", hidden=384, width=128),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
    """A trained scorer: its specification, parameters (float32) and, for the text tower of words, the vocabulary."""

    spec: ScorerSpec
    params: Mapping[str, np.ndarray]
    vocabulary: tuple[str, ...] = ()

    def tokens(self, prompts: Sequence[str]) -> np.ndarray:
        """Tokenise prompts for the text tower, int32 (B, L)."""
        return read(self.spec, prompts, self.vocabulary)

    def score(self, images: jax.Array, prompts: Sequence[str]) -> jax.Array:
        """Scores (B,) of images (B, H, W, 3) in 0..1, each with its prompt; differentiable in the images."""
        return score(self.spec, self.params, load_lite0(), images, self.tokens(prompts))

    def text(self, prompts: Sequence[str]) -> np.ndarray:
        """Unit vectors (B, D) of prompts."""
        return np.asarray(_embed_text(self.spec, dict(self.params), self.tokens(prompts)))

    def images(self, seen: np.ndarray) -> np.ndarray:
        """Unit vectors (B, D) of what the frozen network saw, see `tower_input`."""
        return np.asarray(_embed_images(dict(self.params), np.asarray(seen, np.float32)))


def score(spec: ScorerSpec, params: Params, trunk: Params, images: jax.Array, tokens: Any) -> jax.Array:
    """Cosine times 100, (B,), of images (B, H, W, 3) in 0..1 and tokens (B, L): the function behind `Scorer.score`."""
    mine = embed_images(params, tower_input(spec, trunk, images * 255.0))
    return SCALE * jnp.sum(mine * embed_text(spec, params, tokens), axis=-1)


def tower_input(spec: ScorerSpec, trunk: Params, images: jax.Array) -> jax.Array:
    """Compute the image tower's input of images (B, H, W, 3) in 0..255, at 128 px: (B, `ScorerSpec.image_width`)."""
    images = fitted(images, SMALL)
    pooled = []
    if spec.image_tower == "pooled":
        return jnp.concatenate([lite0(trunk, images), thumbnail(images)], axis=-1)
    for x in block_features(trunk, images, MIDDLE_BLOCKS):
        pooled += [jnp.mean(x, axis=(1, 2)), jnp.max(x, axis=(1, 2))]
    return jnp.concatenate(pooled, axis=-1)


def seen_by(spec: ScorerSpec, images: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
    """Compute the image tower's input of many uint8 images (N, H, W, 3): (N, `ScorerSpec.image_width`), float32.

    In batches of one size, the last filled up, so that one program serves any N.
    """
    found = [np.zeros((0, spec.image_width), np.float32)]
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        batch = np.zeros((batch_size, *images.shape[1:]), np.float32)
        batch[: len(part)] = part
        found.append(np.asarray(_tower_input(spec, load_lite0(), batch))[: len(part)])
    return np.concatenate(found)


def seen_with(features: np.ndarray, images: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
    """Compute `seen_by` of ``report`` for uint8 images (N, H, W, 3) whose features (N, 1280) are known.

    Images up to 128 px have been through the network as it sees them already, and do not go through it again.
    """
    if max(images.shape[1:3]) > SMALL:
        return seen_by(SPECS["report"], images, batch_size=batch_size)
    parts = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    padded = (np.concatenate([part, np.zeros((batch_size - len(part), *part.shape[1:]), part.dtype)]) for part in parts)
    small = [np.asarray(_thumbnails(batch))[: len(part)] for batch, part in zip(padded, parts, strict=True)]
    return np.concatenate([features, np.concatenate(small)], axis=1)


def thumbnail(images: jax.Array) -> jax.Array:
    """Colours at a glance, which the pooled features know too little of: images (B, 128, 128, 3) as (B, 4 * 4 * 3)."""
    count, side = images.shape[0], SMALL // THUMBNAIL
    cells = images.reshape(count, THUMBNAIL, side, THUMBNAIL, side, 3)
    return jnp.mean(cells, axis=(2, 4)).reshape(count, -1)


def embed_images(params: Params, seen: jax.Array) -> jax.Array:
    """Unit vectors (B, D) of what `tower_input` returns: standardised, one hidden layer."""
    x = (seen - params["eye.mean"][None]) / params["eye.deviation"][None]
    x = jax.nn.gelu(text_towers.linear(params, "eye.hidden", x), approximate=False)
    return unit(text_towers.linear(params, "eye.out", x))


def embed_text(spec: ScorerSpec, params: Params, tokens: Any) -> jax.Array:
    """Unit vectors (B, D) of tokens (B, L)."""
    tower = text_towers.words if spec.text_tower == "words" else text_towers.letters
    return unit(tower(params, tokens))


def unit(x: jax.Array) -> jax.Array:
    """Vectors (B, D) brought to length one."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def read(spec: ScorerSpec, prompts: Sequence[str], vocabulary: Sequence[str]) -> np.ndarray:
    """Tokenise prompts to int32 (B, L), for the text tower of this specification."""
    if spec.text_tower == "words":
        return text_towers.word_tokens(prompts, vocabulary)
    return text_towers.letter_tokens(prompts)


def init_scorer(spec: ScorerSpec, key: jax.Array, vocabulary: int) -> dict[str, jax.Array]:
    """Fresh parameters, float32, for a vocabulary of this many words."""
    image_key, tower = jax.random.split(key)
    first, second = jax.random.split(image_key)
    params = {
        "eye.mean": jnp.zeros((spec.image_width,)),
        "eye.deviation": jnp.ones((spec.image_width,)),
        **text_towers.init_linear("eye.hidden", first, spec.image_width, spec.hidden),
        **text_towers.init_linear("eye.out", second, spec.hidden, spec.width),
    }
    if spec.text_tower == "words":
        return params | text_towers.init_words(tower, vocabulary, spec.width)
    return params | text_towers.init_letters(tower, spec.width)


@functools.cache
def load_scorer(name: ScorerName, folder: Path | None = None) -> Scorer:
    """A scorer that ships with the package, or of that name in another ``folder``.

    Raises:
        UserError: a file is missing or damaged, or its tensors are not those of this scorer.
    """
    spec, source = SPECS[name], (folder or assets() / "scorers") / name
    with open_tensors(source / "model.safetensors") as file:
        params = {key: file.read(key).astype(np.float32) for key in file.keys()}  # noqa: SIM118
        vocabulary = tuple(file.metadata.get("vocabulary", "").split())
    expected = jax.eval_shape(lambda: init_scorer(spec, jax.random.key(0), len(vocabulary)))
    shapes = {key: value.shape for key, value in expected.items()}
    if shapes != {key: value.shape for key, value in params.items()}:
        raise UserError(f"{source / 'model.safetensors'}: its tensors are not those of the {name} scorer")
    return Scorer(spec=spec, params=params, vocabulary=vocabulary)


def load_card(name: ScorerName) -> dict[str, Any]:
    """Load the card of a scorer that ships with the package: its training, and what it was measured to distinguish."""
    card: dict[str, Any] = json.loads((assets() / "scorers" / name / "card.json").read_text(encoding="utf-8"))
    return card


_tower_input = jax.jit(tower_input, static_argnums=0)
_thumbnails = jax.jit(lambda images: thumbnail(fitted(images, SMALL)))
_embed_images = jax.jit(embed_images)
_embed_text = jax.jit(embed_text, static_argnums=0)
