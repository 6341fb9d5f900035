"""Training a scorer: a symmetric contrastive loss over features that the frozen network has computed once.

As CLIP's (arXiv 2103.00020, figure 3), but a caption that fits several images of a batch shares its target among
them: one concept comes in several styles, and a caption without a style fits them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypersd_jax.evaluation.scorer import Scorer, ScorerSpec, embed_images, embed_text, init_scorer, read
from hypersd_jax.evaluation.text_towers import PADDING, UNKNOWN, split_words

NO_STYLE = ""
LEAST_DEVIATION = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerData:
    """``seen`` (N, V, E): each of N images in V variants, on different backgrounds, as the frozen network sees them.

    The parts of their captions: ``names`` and ``styles`` have N entries, ``backgrounds`` (N, V) the
    colours' names.
    """

    seen: np.ndarray
    names: Sequence[str]
    styles: Sequence[str]
    backgrounds: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerTraining:
    """``grouped``: every which epoch keeps a concept's images together, so that style and background tell them apart.

    ``style_dropout`` and ``noise``: how often a caption goes without its style, and the share of values hidden."""

    epochs: int = 40
    grouped: int = 2
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.2
    style_dropout: float = 0.5
    noise: float = 0.4
    seed: int = 0


def caption_text(name: str, style: str, background: str) -> str:
    """``"NAME, STYLE style, COLOUR background"``: no style where it is empty, no background where it is white."""
    text = f"{name}, {style} style" if style else name
    return text if background == "white" else f"{text}, {background} background"


def train_scorer(spec: ScorerSpec, data: ScorerData, options: ScorerTraining) -> Scorer:
    """Train from nothing; the same data and options give the same scorer on one machine."""
    count, variants = data.backgrounds.shape
    vocabulary = _vocabulary(data)
    tokens = _tokens(spec, data, vocabulary)
    params = init_scorer(spec, jax.random.key(options.seed), len(vocabulary))
    flat = data.seen.reshape(-1, data.seen.shape[-1]).astype(np.float32)
    params["eye.mean"] = jnp.asarray(flat.mean(axis=0))
    params["eye.deviation"] = jnp.asarray(np.maximum(flat.std(axis=0), LEAST_DEVIATION))
    params["temperature"] = jnp.asarray(np.log(1 / 0.07), jnp.float32)
    size = min(options.batch_size, count)
    steps = options.epochs * (count // size)
    rate = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, steps // 10, steps)
    optimizer = optax.adamw(rate, weight_decay=options.weight_decay)
    step = _make_step(spec, optimizer, options.noise)
    state, rng = optimizer.init(params), np.random.default_rng(options.seed)
    names, backgrounds = _numbers(data.names), _numbers(data.backgrounds.ravel()).reshape(data.backgrounds.shape)
    styles = _numbers(data.styles)
    number = 0
    for epoch in range(options.epochs):
        by_concept = epoch % options.grouped == options.grouped - 1
        order = np.argsort(rng.random(names.max() + 1)[names], kind="stable") if by_concept else rng.permutation(count)
        for start in range(0, count - size + 1, size):
            rows = order[start : start + size]
            background = rng.integers(0, variants, size)
            plain = rng.random(size) < options.style_dropout
            batch = {
                "seen": data.seen[rows, background].astype(np.float32),
                "tokens": tokens[rows, background, plain.astype(int)],
                "fits": _fits(
                    names[rows], np.where(plain, -1, styles[rows]), styles[rows], backgrounds[rows, background]
                ),
            }
            params, state, _ = step(params, state, batch, jax.random.key(options.seed * 1_000_003 + number))
            number += 1
    kept = {key: np.asarray(value) for key, value in params.items() if key != "temperature"}
    return Scorer(spec=spec, params=kept, vocabulary=vocabulary if spec.text_tower == "words" else ())


def contrastive_loss(mine: jax.Array, theirs: jax.Array, fits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Mean cross-entropy of images (B, D) over captions (B, D) and back, all of length one.

    ``fits`` (B, B) is 1 where caption j is true of image i; a row's or column's target is spread over its ones.
    ``temperature`` is the logarithm of what cosines are multiplied with.
    """
    logits = jnp.exp(temperature) * jnp.matmul(mine, theirs.T, precision="highest")
    loss = jnp.zeros(())
    for table, truth in ((logits, fits), (logits.T, fits.T)):
        target = truth / jnp.sum(truth, axis=1, keepdims=True)
        loss -= 0.5 * jnp.mean(jnp.sum(target * jax.nn.log_softmax(table, axis=1), axis=1))
    return loss


def _make_step(spec: ScorerSpec, optimizer: optax.GradientTransformation, noise: float) -> Any:
    def loss_of(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        seen_key, word_key = jax.random.split(key)
        kept = jax.random.bernoulli(seen_key, 1 - noise, batch["seen"].shape)
        seen = jnp.where(kept, batch["seen"], params["eye.mean"][None])
        # Words are hidden too, so that no single one carries a caption and the unknown word means something.
        hidden = jax.random.bernoulli(word_key, noise / 4, batch["tokens"].shape) & (batch["tokens"] != PADDING)
        tokens = jnp.where(hidden, UNKNOWN if spec.text_tower == "words" else PADDING, batch["tokens"])
        theirs = embed_text(spec, params, tokens)
        return contrastive_loss(embed_images(params, seen), theirs, batch["fits"], params["temperature"])

    @jax.jit
    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(params, batch, key)
        for fixed in ("eye.mean", "eye.deviation"):
            gradient[fixed] = jnp.zeros_like(gradient[fixed])
        updates, state = optimizer.update(gradient, state, params)
        updates |= {fixed: jnp.zeros_like(updates[fixed]) for fixed in ("eye.mean", "eye.deviation")}
        params = optax.apply_updates(params, updates)
        return params, state, loss

    return step


def _fits(names: np.ndarray, said: np.ndarray, styles: np.ndarray, backgrounds: np.ndarray) -> np.ndarray:
    """(B, B) float32: caption j, whose style ``said`` is -1 where it names none, is true of image i."""
    same = (names[:, None] == names[None]) & (backgrounds[:, None] == backgrounds[None])
    return (same & ((said[None] == -1) | (said[None] == styles[:, None]))).astype(np.float32)


def _tokens(spec: ScorerSpec, data: ScorerData, vocabulary: Sequence[str]) -> np.ndarray:
    """(N, V, 2, L): of each image's captions with and without its style."""
    texts = [
        caption_text(name, said, background)
        for name, style, backgrounds in zip(data.names, data.styles, data.backgrounds, strict=True)
        for background in backgrounds
        for said in (style, NO_STYLE)
    ]
    return read(spec, texts, vocabulary).reshape(*data.backgrounds.shape, 2, -1)


def _vocabulary(data: ScorerData) -> tuple[str, ...]:
    """Every word of the captions, sorted."""
    parts = [*data.names, *data.styles, *np.unique(data.backgrounds)]
    texts = [", style background", *(str(part) for part in parts)]
    return tuple(sorted({word for text in texts for word in split_words(text)}))


def _numbers(texts: Any) -> np.ndarray:
    """Equal texts as equal numbers from 0."""
    return np.unique(np.asarray(texts), return_inverse=True)[1]
