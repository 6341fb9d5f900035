from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from hypersd_jax.data import COLOURS, EmojiSource, evaluation_images, evaluation_list, load_emoji, split_of
from hypersd_jax.data.emoji_source import sample_backgrounds
from hypersd_jax.data.order import mix, shuffled
from hypersd_jax.errors import UserError

EVALUATION_DIGEST = "6584e7b98b4c2ab7675995d1acb3676f23075a26f15f2742ed9efbe3d7d9390f"


def test_hash_is_splitmix64() -> None:
    # The reference generator seeded with 0 and 1234567 gives these first values.
    assert int(mix(0)[0]) == 0xE220A8397B1DCDAF
    assert int(mix(1234567)[0]) == 6457827717110365317


def test_an_epoch_holds_every_item_once_in_its_own_order() -> None:
    first = shuffled(np.arange(50), 50, seed=3)
    second = shuffled(np.arange(50, 100), 50, seed=3)
    assert sorted(first) == sorted(second) == list(range(50))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, shuffled(np.arange(50), 50, seed=4))


def test_order_depends_on_the_position_alone() -> None:
    whole = shuffled(np.arange(120), 50, seed=0)
    scattered = np.array([119, 3, 51, 50, 49, 3])
    np.testing.assert_array_equal(shuffled(scattered, 50, seed=0), whole[scattered])


def test_pairs_depend_on_seed_and_position_alone() -> None:
    source = EmojiSource(seed=1)
    whole = source.batch(np.arange(40, 56))
    assert whole.images.shape == (16, 64, 64, 3)
    assert whole.images.dtype == np.uint8
    again = EmojiSource(seed=1).batch(np.arange(48, 52))
    np.testing.assert_array_equal(again.images, whole.images[8:12])
    assert again.captions == whole.captions[8:12]
    assert EmojiSource(seed=2).batch(np.arange(40, 56)).captions != whole.captions


def test_slices_of_processes_make_up_the_batch() -> None:
    source = EmojiSource()
    positions = 4370 + np.arange(24)  # across the end of an epoch
    whole = source.batch(positions)
    parts = [source.batch(part) for part in positions.reshape(3, 8)]
    np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), whole.images)
    assert [text for part in parts for text in part.captions] == whole.captions


def test_training_never_sees_a_held_out_concept() -> None:
    source = EmojiSource()
    emoji = load_emoji()
    held_out = {r.label for r in emoji.records if split_of(r) == "test"}
    assert len(source) == len(emoji.indices("train"))
    captions = source.prompts(np.arange(len(source)))
    assert not {text.split(", ")[0] for text in captions} & held_out


def test_the_ground_is_the_captions_colour() -> None:
    batch = EmojiSource(white_fraction=0.0).batch(np.arange(8))
    for image, text in zip(batch.images, batch.captions, strict=True):
        colour = text.rsplit(", ", 1)[1].removesuffix(" background")
        np.testing.assert_array_equal(image[0, 0], COLOURS[colour])
    assert not any("background" in text for text in EmojiSource(white_fraction=1.0).batch(np.arange(8)).captions)


def test_backgrounds_are_drawn_evenly() -> None:
    colours = sample_backgrounds(np.arange(20000), seed=0, white_fraction=0.5)
    shares = {name: colours.count(name) / len(colours) for name in COLOURS}
    assert shares.pop("white") == pytest.approx(0.5, abs=0.01)
    assert all(share == pytest.approx(0.5 / 7, abs=0.006) for share in shares.values())


def test_other_resolutions_and_groups() -> None:
    source = EmojiSource(resolution=32, groups=["food & drink"])
    assert source.batch(np.arange(2)).images.shape == (2, 32, 32, 3)
    assert len(source.preview_prompts) == 8
    with pytest.raises(UserError, match=r"data\.groups: sports"):
        EmojiSource(groups=["sports"])


def test_evaluation_list_is_fixed() -> None:
    items = evaluation_list()
    text = json.dumps([dataclasses.astuple(item) for item in items])
    assert hashlib.sha256(text.encode()).hexdigest() == EVALUATION_DIGEST


def test_evaluation_list_is_held_out_and_matches_its_images() -> None:
    items = evaluation_list(256)
    emoji = load_emoji()
    assert len({item.seed for item in items}) == 256
    assert len({item.index for item in items}) == 256
    assert all(split_of(emoji.records[item.index]) == "test" for item in items)
    assert all(item.prompt.startswith(emoji.records[item.index].label) for item in items)
    assert evaluation_list(10) == items[:10]
    assert evaluation_list(10, seed=1) != items[:10]
    images = evaluation_images(items[:4])
    assert images.shape == (4, 64, 64, 3)
    for image, item in zip(images, items, strict=False):
        np.testing.assert_array_equal(image[0, 0], COLOURS[item.background])


def test_evaluation_list_of_groups() -> None:
    groups = ["food & drink", "animals & nature"]
    assert {item.group for item in evaluation_list(64, groups=groups)} == set(groups)


@pytest.mark.parametrize("white_fraction", [0.0, 0.5, 1.0])
def test_keys_find_the_pairs_again(white_fraction: float) -> None:
    source = EmojiSource(seed=1, white_fraction=white_fraction, groups=["activities"])
    positions = np.arange(60)
    keys = source.keys(positions)
    batch, again = source.batch(positions), source.variant_batch(keys)
    np.testing.assert_array_equal(batch.images, again.images)
    assert batch.captions == again.captions == source.captions(keys)
    variants = source.variants()
    assert len(variants) == len(source) * {0.0: 7, 0.5: 8, 1.0: 1}[white_fraction]
    assert np.all(np.diff(variants) > 0)
    assert np.isin(source.keys(np.arange(20 * len(source))), variants).all()
    assert source.uncacheable is None


def test_keys_are_the_same_in_every_split_and_choice_of_groups() -> None:
    some, more = EmojiSource(groups=["activities"]), EmojiSource(split="all", seed=9)
    assert np.isin(some.variants(), more.variants()).all()
    keys = some.variants()[[0, 5, 70]]
    assert some.variant_batch(keys).captions == more.variant_batch(keys).captions


def test_sizes_are_the_drawings_own() -> None:
    sizes = EmojiSource(resolution=32).batch(np.arange(2)).sizes
    np.testing.assert_array_equal(sizes, np.tile(np.float32([64, 64, 0, 0, 32, 32]), (2, 1)))
