from __future__ import annotations

import collections

import numpy as np
import pytest

from hypersd_jax.data import COLOURS, EmojiRecord, caption, composite, load_emoji, split_of
from hypersd_jax.errors import UserError

STYLES = {"noto", "blob", "fluent gradient", "fluent flat", "fluent 3d"}


def record(**changes: str) -> EmojiRecord:
    fields = {
        "label": "red apple",
        "style": "fluent flat",
        "group": "food & drink",
        "subgroup": "fruit",
        "tags": "apple",
        "license": "MIT",
        "hexcode": "1F34E",
        "concept": "1F34E",
    }
    return EmojiRecord(**{**fields, **changes})


def test_the_set_is_complete_and_of_settled_licences() -> None:
    emoji = load_emoji()
    assert emoji.images.shape == (4858, 64, 64, 4)
    assert emoji.images.dtype == np.uint8
    assert len(emoji) == len(emoji.records) == 4858
    assert {r.style for r in emoji.records} == STYLES
    assert {r.license for r in emoji.records} == {"MIT", "Apache-2.0"}
    assert len({r.label for r in emoji.records}) == 1032
    # "eye in speech bubble" was drawn twice in one style.
    assert len({(r.hexcode, r.style) for r in emoji.records}) == 4857


def test_images_stand_beside_their_own_records() -> None:
    emoji = load_emoji()
    mean = {}
    for i, r in enumerate(emoji.records):
        if r.label in ("red heart", "green heart", "blue heart") and r.style == "fluent flat":
            rgb = composite(emoji.images[i], COLOURS["black"]).astype(float)
            mean[r.label] = int(rgb.mean(axis=(0, 1)).argmax())
    assert mean == {"red heart": 0, "green heart": 1, "blue heart": 2}
    coverage = (emoji.images[..., 3] > 0).mean(axis=(1, 2))
    assert coverage.min() > 0.01
    assert coverage.max() < 1.0


def test_a_tenth_of_the_concepts_is_held_out_in_all_styles() -> None:
    emoji = load_emoji()
    splits = collections.defaultdict(set)
    for r in emoji.records:
        splits[r.concept].add(split_of(r))
    assert all(len(found) == 1 for found in splits.values())
    held_out = sum(found == {"test"} for found in splits.values())
    assert held_out / len(splits) == pytest.approx(0.1, abs=0.02)
    train, test = emoji.indices("train"), emoji.indices("test")
    assert len(train) + len(test) == len(emoji)
    assert not set(train) & set(test)
    assert {emoji.records[i].style for i in test} == STYLES


def test_no_image_is_in_both_splits() -> None:
    emoji = load_emoji()
    images = {split: {emoji.images[i].tobytes() for i in emoji.indices(split)} for split in ("train", "test")}
    assert not images["train"] & images["test"]


def test_groups_choose_and_unknown_groups_are_named() -> None:
    emoji = load_emoji()
    chosen = emoji.indices("train", ["food & drink"])
    assert {emoji.records[i].group for i in chosen} == {"food & drink"}
    with pytest.raises(UserError, match=r"food is not among activities, .*food & drink"):
        emoji.indices("train", ["food"])


def test_caption_forms() -> None:
    assert caption(record(), "white") == "red apple, fluent flat style"
    assert caption(record(), "blue") == "red apple, fluent flat style, blue background"


def test_composite_lays_colours_over_the_ground() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 100, 50, 255)
    rgba[0, 1] = (200, 100, 50, 128)
    rgba[1, 0] = (255, 255, 255, 0)
    out = composite(rgba, COLOURS["black"])
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out[0, 0], (200, 100, 50))
    np.testing.assert_array_equal(out[1], np.full((2, 3), COLOURS["black"]))
    background = np.asarray(COLOURS["black"], float)
    np.testing.assert_array_equal(out[0, 1], np.round(background + (np.array([200, 100, 50]) - background) * 128 / 255))


def test_composite_takes_batches() -> None:
    images = load_emoji().images[:3]
    one_by_one = np.stack([composite(image, COLOURS["pink"]) for image in images])
    np.testing.assert_array_equal(composite(images, COLOURS["pink"]), one_by_one)
