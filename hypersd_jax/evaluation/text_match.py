"""How well images fit their prompts, next to how well they fit others: without that zero a score says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hypersd_jax.data.order import text_fraction
from hypersd_jax.evaluation.metrics import Estimate, mean_estimate
from hypersd_jax.evaluation.scorer import SCALE, Scorer
from hypersd_jax.evaluation.text_towers import split_words


class TextMatch(NamedTuple):
    """Scores (N,) of images with their own prompts and with others'."""

    own: np.ndarray
    shuffled: np.ndarray

    @property
    def gains(self) -> np.ndarray:
        """How much better the images (N,) fit their own prompts than others; zero by chance."""
        return self.own - self.shuffled

    @property
    def gain(self) -> Estimate:
        """Mean gain of the images."""
        return mean_estimate(self.gains)


def derangement(prompts: Sequence[str]) -> np.ndarray | None:
    """For each prompt the index of one with another text, int64 (N,), each index once; the same each time.

    Equal texts are put side by side, in an order that says nothing, and the list is turned by half. None where that
    gives a prompt its own text, which no other order can avoid: one text is more than half of the list.
    """
    texts = np.asarray(prompts)
    aside = np.lexsort((texts, np.asarray([text_fraction(prompt) for prompt in prompts])))
    order = np.empty(len(texts), np.int64)
    order[aside] = np.roll(aside, -(len(texts) // 2))
    return order if len(texts) and not np.any(texts[order] == texts) else None


def text_match(scorer: Scorer, seen: np.ndarray, prompts: Sequence[str]) -> TextMatch | None:
    """Scores of images, as the frozen network has seen them (N, E); None where the prompts cannot be shuffled."""
    order = derangement(prompts)
    if order is None:
        return None
    images, texts = scorer.images(seen), scorer.text(prompts)
    images, texts = SCALE * images.astype(np.float64), texts.astype(np.float64)
    return TextMatch(np.sum(images * texts, axis=1), np.sum(images * texts[order], axis=1))


def knows(scorer: Scorer, prompts: Sequence[str]) -> bool:
    """Tell whether a text tower of words knows every word of the prompts: without that its score is a guess."""
    return {word for prompt in prompts for word in split_words(prompt)} <= set(scorer.vocabulary)
