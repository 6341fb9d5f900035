"""The two scorers that ship: what they read and see, that they distinguish images, and gradients."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.data import COLOURS, evaluation_images, evaluation_list
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import load_card, load_scorer, seen_by
from hypersd_jax.evaluation.lite0 import block_features, load_lite0
from hypersd_jax.evaluation.scorer import MIDDLE_BLOCKS, SCALE, score, thumbnail
from hypersd_jax.evaluation.text_towers import MOST_WORDS, UNKNOWN, letter_tokens, split_words, word_tokens
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.tensors import save_tensors

NAMES = ("report", "reward")
COUNT = 24


@pytest.fixture(scope="module")
def embedded() -> np.ndarray:
    return evaluation_images(evaluation_list(COUNT))


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [item.prompt for item in evaluation_list(COUNT)]


def test_words_in_their_order() -> None:
    assert split_words("Jack-o'-lantern, BLOB style") == ["jack", "o", "lantern", ",", "blob", "style"]
    tokens = word_tokens(["style, blob new", " ".join(["blob"] * 99)], ("blob", "style", ","))
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[0], [3, 4, 2, UNKNOWN] + [0] * (MOST_WORDS - 4))
    np.testing.assert_array_equal(tokens[1], [2] * MOST_WORDS)


def test_letters_in_a_bag() -> None:
    one, other = letter_tokens(["red apple, blue background", "red  apple blue background!"])
    np.testing.assert_array_equal(one, other)  # no commas, no spaces, no order of groups
    assert len(set(one[one > 0])) == (one > 0).sum()
    bag = [set(row) for row in letter_tokens(["red apple", "apple red"])]
    assert len(bag[0] ^ bag[1]) == 2, "only the pair of words differs"
    assert letter_tokens(["x" * 4000]).shape == letter_tokens([""]).shape


@pytest.mark.parametrize("name", NAMES)
def test_own_prompts_score_above_others(name: str, embedded: np.ndarray, prompts: list[str]) -> None:
    scorer = load_scorer(name)  # type: ignore[arg-type]
    mine = scorer.images(seen_by(scorer.spec, embedded))
    texts = scorer.text(prompts)
    np.testing.assert_allclose(np.linalg.norm(mine, axis=1), 1.0, rtol=1e-5)
    table = SCALE * mine @ texts.T
    own = np.diag(table)
    others = table[~np.eye(COUNT, dtype=bool)]
    assert own.mean() > others.mean() + 15
    one = np.asarray(scorer.score(jnp.asarray(embedded[:3], jnp.float32) / 255, prompts[:3]))
    np.testing.assert_allclose(one, own[:3], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_another_background_or_style_scores_less(name: str, embedded: np.ndarray) -> None:
    scorer = load_scorer(name)  # type: ignore[arg-type]
    mine = scorer.images(seen_by(scorer.spec, embedded))
    items = evaluation_list(COUNT)
    colours, styles = list(COLOURS), ("noto", "blob", "fluent flat")

    def rate(swapped: list[str]) -> float:
        own = np.sum(mine * scorer.text([item.prompt for item in items]), axis=1)
        return float(np.mean(own > np.sum(mine * scorer.text(swapped), axis=1)))

    def background(prompt: str, colour: str) -> str:
        before = prompt.split(" style")[0] + " style"
        return before if colour == "white" else f"{before}, {colour} background"

    assert rate([background(i.prompt, colours[(colours.index(i.background) + 3) % 8]) for i in items]) > 0.85
    assert (
        rate([i.prompt.replace(i.style, next(s for s in styles if s != i.style)) for i in items]) > 0.7
    )  # by chance: 0.5


@pytest.mark.parametrize("name", NAMES)
def test_what_is_seen_does_not_depend_on_the_batch(name: str, embedded: np.ndarray) -> None:
    spec = load_scorer(name).spec  # type: ignore[arg-type]
    whole, parts = seen_by(spec, embedded[:3], batch_size=3), seen_by(spec, embedded[:3], batch_size=2)
    assert whole.shape == (3, spec.image_width)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-3)
    assert seen_by(spec, embedded[:0]).shape == (0, spec.image_width)


def test_blocks_come_in_the_layers_shapes() -> None:
    images = jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.float32)
    found = jax.eval_shape(lambda x: block_features(load_lite0(), x, MIDDLE_BLOCKS), images)
    assert [x.shape for x in found] == [(2, 16, 16, 40), (2, 8, 8, 112)]


def test_the_two_share_no_features() -> None:
    report, reward = (load_scorer(name) for name in NAMES)  # type: ignore[arg-type]
    assert report.spec.image_tower != reward.spec.image_tower
    assert report.spec.text_tower != reward.spec.text_tower
    assert reward.vocabulary == ()


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_the_image(name: str, embedded: np.ndarray, prompts: list[str]) -> None:
    scorer = load_scorer(name)  # type: ignore[arg-type]
    images = jnp.asarray(embedded[:1, ::2, ::2], jnp.float32) / 255
    tokens = scorer.tokens(prompts[:1])
    value = jax.jit(lambda x: jnp.sum(score(scorer.spec, scorer.params, load_lite0(), x, tokens)))
    slope = jax.jit(jax.grad(value))(images)
    assert np.isfinite(slope).all()
    step = 1e-3 * slope / jnp.linalg.norm(slope)
    rise = float(value(images + step) - value(images - step))
    assert rise == pytest.approx(2e-3 * float(jnp.linalg.norm(slope)), rel=0.1)  # kinks of ReLU6


def test_a_thumbnail_by_hand() -> None:
    images = np.zeros((1, 128, 128, 3), np.float32)
    images[0, :32, 96:, 1] = 64.0
    small = np.asarray(thumbnail(jnp.asarray(images))).reshape(4, 4, 3)
    expected = np.zeros((4, 4, 3))
    expected[0, 3, 1] = 64.0
    np.testing.assert_array_equal(small, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_cards_say_what_was_measured(name: str) -> None:
    card = load_card(name)  # type: ignore[arg-type]
    styles, concepts = card["unseen_styles"], card["unseen_concepts"]
    assert styles["names"] > 900
    assert 10 / styles["names"] < styles["r1"] < styles["r5"] < 1
    for key, least in (("auc", 0.95), ("colour_swap", 0.95)):
        assert least < styles[key] <= 1
    for key, least in (("auc", 0.7), ("colour_swap", 0.95), ("style_swap", 0.8)):
        assert least < concepts[key] <= 1
    assert sum(path.stat().st_size for path in (assets() / "scorers" / name).iterdir()) < 3_000_000


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward.model\.safetensors: no such file"):
        load_scorer("reward", tmp_path)
    save_tensors(tmp_path / "reward" / "model.safetensors", {"eye.mean": np.zeros(3, np.float16)})
    with pytest.raises(UserError, match=r"model\.safetensors: its tensors are not those of the reward scorer"):
        load_scorer("reward", tmp_path)
    other = tmp_path / "other"
    shutil.copytree(assets() / "scorers" / "reward", other / "reward")
    np.testing.assert_array_equal(load_scorer("reward", other).text(["a lion"]), load_scorer("reward").text(["a lion"]))
