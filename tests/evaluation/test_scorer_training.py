"""Training a scorer on made-up features, its loss and its checks by hand."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.evaluation.scorer import SPECS
from hypersd_jax.evaluation.scorer_checks import auc, chosen_rate, retrieval
from hypersd_jax.evaluation.scorer_training import (
    ScorerData,
    ScorerTraining,
    caption_text,
    contrastive_loss,
    train_scorer,
)

NAMES, STYLES, BACKGROUNDS = [f"thing{i}" for i in range(12)], ["noto", "blob"], ["white", "red"]


def made_up(seed: int) -> ScorerData:
    """Features that are the sum of what a name, a style and a background look like, with noise."""
    width = SPECS["reward"].image_width
    looks = np.random.default_rng(0).normal(size=(3, 12, width))
    rng = np.random.default_rng(seed)
    pairs = [(name, style) for name in range(12) for style in range(2)]
    seen = [[looks[0, n] + looks[1, s] + looks[2, g] for g in range(2)] for n, s in pairs]
    return ScorerData(
        seen=np.asarray(seen) + 0.3 * rng.normal(size=(24, 2, width)),
        names=[NAMES[n] for n, _ in pairs],
        styles=[STYLES[s] for _, s in pairs],
        backgrounds=np.array([BACKGROUNDS] * 24),
    )


@pytest.mark.parametrize("reader", ["words", "letters"])
def test_training_learns_names_styles_and_backgrounds(reader: str) -> None:
    spec = dataclasses.replace(SPECS["reward"], text_tower=reader, hidden=32, width=16)  # type: ignore[arg-type]
    options = ScorerTraining(epochs=80, batch_size=24, learning_rate=1e-2, seed=3)
    data, unseen = made_up(1), made_up(2)
    texts = [caption_text(n, s, g) for n, s in zip(data.names, data.styles, strict=True) for g in BACKGROUNDS]

    def found(epochs: int) -> float:
        scorer = train_scorer(spec, data, dataclasses.replace(options, epochs=epochs))
        mine = scorer.images(unseen.seen.reshape(48, -1))
        return retrieval(mine, scorer.text(texts), np.arange(48))[0]

    assert found(1) < 0.3
    assert found(80) > 0.9


def test_the_same_seed_gives_the_same_scorer() -> None:
    spec = dataclasses.replace(SPECS["reward"], hidden=8, width=8)
    data, options = made_up(1), ScorerTraining(epochs=2, batch_size=24, seed=5)
    one, again = (train_scorer(spec, data, options) for _ in range(2))
    other = train_scorer(spec, data, dataclasses.replace(options, seed=6))
    for key, value in one.params.items():
        np.testing.assert_array_equal(value, again.params[key], err_msg=key)
    assert np.abs(one.params["eye.out.kernel"] - other.params["eye.out.kernel"]).max() > 0.1


def test_the_image_tower_is_standardised_and_stays_so() -> None:
    data = made_up(1)
    scorer = train_scorer(dataclasses.replace(SPECS["reward"], hidden=8, width=8), data, ScorerTraining(epochs=1))
    flat = data.seen.reshape(48, -1)
    np.testing.assert_allclose(scorer.params["eye.mean"], flat.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scorer.params["eye.deviation"], flat.std(axis=0), rtol=1e-4)


def test_the_loss_by_hand() -> None:
    """Two images of one thing share one caption's column; the third stands alone."""
    mine = np.eye(3, 4, dtype=np.float32)
    theirs = np.array([[1, 0, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 0.8, 0.6]], np.float32)
    fits = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    logits = 2.0 * mine @ theirs.T
    expected = 0.0
    for table, truth in ((logits, fits), (logits.T, fits.T)):
        chances = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
        for row in range(3):
            expected -= np.mean(np.log(chances[row][truth[row] == 1])) / 6
    loss = contrastive_loss(jnp.asarray(mine), jnp.asarray(theirs), jnp.asarray(fits), jnp.log(2.0))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_captions() -> None:
    assert caption_text("lion", "blob", "red") == "lion, blob style, red background"
    assert caption_text("lion", "", "white") == "lion"


def test_the_checks_by_hand() -> None:
    images, texts = np.eye(3), np.array([[1.0, 0, 0], [0.9, 0.5, 0], [0, 0.8, 0.1]])
    assert retrieval(images, texts, np.array([0, 1, 2]), (1, 2)) == [pytest.approx(2 / 3), 1.0]
    assert auc(np.array([3.0, 2.0, 1.0]), np.array([2.0, 0.0])) == pytest.approx((2 + 1.5 + 1) / 6)
    assert chosen_rate(np.array([1.0, 1.0, 1.0]), np.array([0.0, 1.0, 2.0])) == pytest.approx(0.5)
