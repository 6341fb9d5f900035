"""The CLIP score by name, from a folder: scores, batches, what it is given, and gradients."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import hypersd_jax as hs
from hypersd_jax.errors import UserError
from hypersd_jax.rewards import LoadedReward, clip_score, reward
from hypersd_jax.weights.tensors import save_tensors
from tests.helpers.tiny_clip import CONFIG, tiny_clip, tiny_tensors

PROMPTS = ["red apple", "blue cat on a green field, fluent flat style", "", "a grey horse"]
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 20, 28, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("weights") / "clip")


@pytest.fixture(scope="module")
def score(folder: Path) -> LoadedReward:
    return hs.rewards.load("clip", folder)


def test_scores_are_cosines_times_100(score: LoadedReward) -> None:
    found = score(IMAGES, PROMPTS)
    assert (found.shape, found.dtype) == ((4,), np.float32)
    embed_images, embed_texts = (
        jax.jit(functools.partial(embed, score.model)) for embed in (clip_score.embed_images, clip_score.embed_texts)
    )
    seen = embed_images(score.params, jnp.asarray(IMAGES))
    read = embed_texts(score.params, jnp.asarray(score.tokenize(PROMPTS)))
    np.testing.assert_allclose(np.linalg.norm(seen, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(read, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(found, 100 * np.sum(np.asarray(seen) * np.asarray(read), axis=1), rtol=1e-5, atol=1e-4)
    assert len(set(found.round(3))) == 4
    assert found.min() < 0 < found.max()  # not cut off at 0


def test_bytes_floats_and_pil_images_score_alike(score: LoadedReward) -> None:
    wanted = score(IMAGES, PROMPTS)
    np.testing.assert_allclose(score(IMAGES / np.float32(255), PROMPTS), wanted, atol=1e-4)
    np.testing.assert_array_equal(score([Image.fromarray(image) for image in IMAGES], PROMPTS), wanted)


def test_the_last_batch_is_filled_up(score: LoadedReward, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = score(IMAGES, PROMPTS)
    monkeypatch.setattr(reward, "BATCH", 3)
    np.testing.assert_allclose(score(IMAGES, PROMPTS), wanted, atol=1e-4)
    assert score(IMAGES[:0], []).shape == (0,)


def test_gradients_in_the_images(score: LoadedReward) -> None:
    """Against finite differences along one direction, and each image's score by its own pixels only."""
    images = jnp.asarray(IMAGES[:2], jnp.float32) / 255
    ids = jnp.asarray(score.tokenize(PROMPTS[:2]))
    scores = jax.jit(lambda x: clip_score.clip_scores(score.model, score.params, x, ids))
    gradient = jax.jit(jax.grad(lambda x: scores(x)[0]))(images)
    assert float(jnp.abs(gradient[1]).max()) == 0.0
    direction = gradient / jnp.linalg.norm(gradient)
    slope = (scores(images + 0.01 * direction)[0] - scores(images - 0.01 * direction)[0]) / 0.02
    np.testing.assert_allclose(slope, jnp.linalg.norm(gradient), rtol=1e-2)
    assert float(slope) > 0.1


def test_long_prompts_are_cut_with_a_warning(score: LoadedReward) -> None:
    with pytest.warns(UserWarning, match="the prompt is longer than 22 tokens"):
        ids = score.tokenize(["red apple " * 40])
    assert ids.shape == (1, 24)
    assert ids[0, -1] == 2273


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (IMAGES, PROMPTS[:3], "4 images, but 3 prompts"),
        (IMAGES, "red apple", "prompts must be a list of texts"),
        (IMAGES, [1, 2, 3, 4], "prompts must be a list of texts"),
        (IMAGES[0], PROMPTS, r"images must be \(B, H, W, 3\), not \(20, 28, 3\)"),
        (IMAGES.astype(np.float32), PROMPTS, r"images hold values from 0\.0 to 255\.0, not 0\.\.1"),
        (np.full((4, 8, 8, 3), np.nan, np.float32), PROMPTS, "images hold values from nan to nan"),
        (IMAGES.astype(np.int64), PROMPTS, r"images must be uint8 or floats in 0\.\.1, not of type int64"),
        ([np.zeros((2, 2, 3)), np.zeros((3, 2, 3))], PROMPTS[:2], "images are not a regular array"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], PROMPTS[:2], "images are of several sizes"),
    ],
)
def test_what_it_is_given_is_checked(score: LoadedReward, images, prompts, message) -> None:
    with pytest.raises(UserError, match=message):
        score(images, prompts)


def test_names(folder: Path) -> None:
    with pytest.raises(UserError, match="'clipp' is not a reward; did you mean clip"):
        hs.rewards.load("clipp", folder)


def _changed(folder: Path, to: Path, **text: object) -> Path:
    """A copy of the folder whose text tower says this, with tensors that fit."""
    shutil.copytree(folder, to)
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], **text}}
    (to / "config.json").write_text(json.dumps(config))
    save_tensors(to / "model.safetensors", tiny_tensors(config))
    return to


def test_tokenizers_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a: the tokenizer has 2274 tokens, but vocab_size is 2000$"):
        hs.rewards.load("clip", _changed(folder, tmp_path / "a", vocab_size=2000))
    with pytest.raises(UserError, match=r"b: eos_token_id=7, but the tokenizer ends with 2273$"):
        hs.rewards.load("clip", _changed(folder, tmp_path / "b", eos_token_id=7))
    other = _changed(folder, tmp_path / "c", eos_token_id=2)
    np.testing.assert_array_equal(
        hs.rewards.load("clip", other)(IMAGES[:1], PROMPTS[:1]),
        hs.rewards.load("clip", folder)(IMAGES[:1], PROMPTS[:1]),
    )
    for name in ("merges.txt", "tokenizer.json", "vocab.json", "tokenizer_config.json"):
        (other / name).unlink()
    with pytest.raises(UserError, match=r"c: no tokenizer files"):
        hs.rewards.load("clip", other)


def test_without_a_tokenizer_clips_own_serves_its_vocabulary(folder: Path, tmp_path: Path) -> None:
    whole = _changed(folder, tmp_path / "whole", vocab_size=49408, eos_token_id=49407, hidden_size=4)
    for name in ("merges.txt", "tokenizer.json", "vocab.json", "tokenizer_config.json"):
        (whole / name).unlink()
    assert hs.rewards.load("clip", whole).tokenize(["a photo of a horse"])[0, :7].tolist() == [
        49406,
        320,
        1125,
        539,
        320,
        4558,
        49407,
    ]


def test_images_prepared_in_another_way(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({"size": 12, "image_mean": [0.1, 0.2, 0.3]}))
    assert hs.rewards.load("clip", tmp_path / "clip").model.steps.mean == (0.1, 0.2, 0.3)
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({"size": 224}))
    with pytest.raises(UserError, match=r"clip: image processor config: size=224 is not supported"):
        hs.rewards.load("clip", tmp_path / "clip")
