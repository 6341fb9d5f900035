"""The judge that looks at raw pixels: what it reads of a prompt, that it distinguishes real images, its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.data import COLOURS, evaluation_images, evaluation_list, load_emoji
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.pixel_judge import (
    PARTS,
    UNSAID,
    class_names,
    classes_of,
    init_judge,
    load_pixel_judge,
    part_logits,
)
from hypersd_jax.evaluation.scorer_reward import embedded_reward
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.tensors import open_tensors, save_tensors
from tests.helpers.quick import quick_jit

COUNT = 48


@pytest.fixture(scope="module")
def embedded() -> np.ndarray:
    return evaluation_images(evaluation_list(COUNT)).astype(np.float32) / 255.0


def test_what_a_prompt_says() -> None:
    names = class_names()
    record = load_emoji().records[0]
    found = classes_of(
        [
            f"{record.label}, {record.style} style, blue background",
            f"{record.label}, {record.style} style",
            f"{record.label}, red background",
            "a castle on a hill, blue sky",
            "blue background",
        ]
    )
    style, subgroup = names["style"].index(record.style), names["subgroup"].index(record.subgroup)
    white, red, blue = (names["background"].index(colour) for colour in ("white", "red", "blue"))
    wanted = [
        [style, blue, subgroup],
        [style, white, subgroup],
        [UNSAID, red, subgroup],
        [UNSAID, UNSAID, UNSAID],
        [UNSAID, UNSAID, UNSAID],
    ]
    np.testing.assert_array_equal(found, wanted)
    assert classes_of([]).shape == (0, len(PARTS))


def test_the_score_is_the_mean_probability_of_what_is_said(embedded: np.ndarray) -> None:
    judge = embedded_reward("embedded:pixels")
    prompts = ["red apple, noto style, blue background", "something unheard of"]
    chances = [jax.nn.softmax(each) for each in part_logits(judge.params, jnp.asarray(embedded[:2]) * 255.0)]
    style, background, subgroup = classes_of(prompts)[0]
    first = (chances[0][0, style] + chances[1][0, background] + chances[2][0, subgroup]) / 3
    np.testing.assert_allclose(judge(embedded[:2], prompts), [100 * first, 0.0], rtol=1e-5)


def test_real_images_are_told_apart(embedded: np.ndarray) -> None:
    """Of the test split, which it has seen; its card has its figures without."""
    judge, items = embedded_reward("embedded:pixels"), evaluation_list(COUNT)
    own = judge(embedded, [item.prompt for item in items])
    others = judge(embedded, [items[(i + COUNT // 2) % COUNT].prompt for i in range(COUNT)])
    assert np.mean(own > others) > 0.95
    wrong = {colour: list(COLOURS)[(i + 3) % len(COLOURS)] for i, colour in enumerate(COLOURS)}
    repainted = [
        f"{item.prompt.partition(', ' + item.background)[0]}, {wrong[item.background]} background" for item in items
    ]
    assert np.mean(own > judge(embedded, repainted)) > 0.95
    card = json.loads((assets() / "scorers" / "pixels" / "card.json").read_text(encoding="utf-8"))
    assert card["unseen_concepts"]["background_accuracy"] > 0.95
    assert card["unseen_concepts"]["style_accuracy"] > 0.6


def test_the_gradient_reaches_the_image(embedded: np.ndarray) -> None:
    judge = embedded_reward("embedded:pixels")
    ids = judge.tokenize(["red apple, noto style, blue background"])
    slope = quick_jit(jax.grad(lambda image: judge.model(judge.params, image, ids).sum()))(embedded[:1])
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() > 0


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_pixel_judge(tmp_path)
    shapes = jax.eval_shape(init_judge, jax.random.key(0))
    params = {key: np.zeros(value.shape, np.float32) for key, value in shapes.items()}
    save_tensors(path, params, metadata={"classes": "[]"})
    with pytest.raises(UserError, match="classes are not those of the pixel judge"):
        load_pixel_judge(tmp_path)
    shutil.copy(assets() / "scorers" / "pixels" / "model.safetensors", path)
    with open_tensors(path) as file:
        kept = {key: file.read(key) for key in file.keys() if key != "stem.bias"}  # noqa: SIM118
        save_tensors(tmp_path / "x" / "model.safetensors", kept, metadata=dict(file.metadata))
    with pytest.raises(UserError, match="tensors or classes are not those"):
        load_pixel_judge(tmp_path / "x")
