"""The stream of pairs: order, resumption, processes, what cannot be read, and chance."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd_jax.config import DataConfig
from hypersd_jax.data import Batch, ImageTextSource, image_sizes, open_source
from hypersd_jax.errors import UserError
from tests.helpers.image_sets import BROKEN, caption, encoded, numbers, parquet, with_metadata, with_sidecars


def opened(source: str | Path, seed: int = 0, **keys: object) -> ImageTextSource:
    found = open_source(DataConfig(source=str(source), **keys), resolution=8, seed=seed)
    assert isinstance(found, ImageTextSource)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return with_metadata(tmp_path / "set", range(7))


@pytest.fixture
def damaged(folder: Path) -> Path:
    """Of seven, two are no images any more and one is gone."""
    for name in ("2.png", "3.png"):
        (folder / name).write_bytes(BROKEN)
    (folder / "5.png").unlink()
    return folder


def same(a: Batch, b: Batch) -> None:
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.sizes, b.sizes)
    assert a.captions == b.captions


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.images[rows], batch.captions[rows], batch.sizes[rows])


def test_an_epoch_holds_every_pair_once_in_an_order_of_its_own(folder: Path) -> None:
    source = opened(folder)
    assert len(source) == 7
    first, second = (numbers(source.batch(np.arange(7) + 7 * epoch)) for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert first != numbers(opened(folder, seed=1).batch(np.arange(7)))


@pytest.mark.parametrize("crop", ["center", "random"])
def test_the_same_positions_hold_the_same_pairs(crop: str, folder: Path) -> None:
    """So a run that resumes at a position sees what it would have seen, and processes share a batch without overlap."""
    whole = opened(folder, crop=crop, flip=crop == "random").batch(np.arange(5, 29))
    resumed = opened(folder, crop=crop, flip=crop == "random")
    same(resumed.batch(np.arange(17, 29)), part(whole, slice(12, None)))
    parts = [resumed.batch(positions) for positions in np.arange(5, 29).reshape(3, 8)]
    for index, each in enumerate(parts):
        same(each, part(whole, slice(8 * index, 8 * index + 8)))


@pytest.mark.filterwarnings("ignore:data.source")
def test_others_stand_in_for_what_cannot_be_read(damaged: Path) -> None:
    source = opened(damaged)
    clean = ImageTextSource.__new__(ImageTextSource)  # the order that there would be without damage
    clean.__dict__.update(source.__dict__, _broken={})
    wanted = [clean._row(0, offset) for offset in range(14)]
    broken = {2, 3, 5}
    found = numbers(source.batch(np.arange(14)))
    for epoch in (0, 1):
        order = wanted[7 * epoch : 7 * epoch + 7]
        twice = order + order
        expected = [next(row for row in twice[offset:] if row not in broken) for offset in range(7)]
        assert found[7 * epoch : 7 * epoch + 7] == expected
        assert set(expected) == set(range(7)) - broken
    scattered = np.asarray([9, 3, 3, 0])
    assert numbers(opened(damaged).batch(scattered)) == [found[position] for position in scattered]


def test_the_unreadable_are_counted_in_one_line(damaged: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = opened(damaged)
        for _ in range(3):
            source.batch(np.arange(21))
    messages = [str(each.message) for each in caught]
    assert len(messages) == 1
    assert f"{damaged}: 3 unreadable images so far" in messages[0]
    assert "\n" not in messages[0]


def test_rows_without_caption_are_left_out_and_counted(tmp_path: Path) -> None:
    with_sidecars(tmp_path, range(5))
    (tmp_path / "1.txt").write_text(" \n")
    (tmp_path / "3.txt").unlink()
    (tmp_path / "4.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.warns(
        UserWarning,
        match=r"left out of 5 .* 2 without caption \(1\.png, 3\.png\), 1 whose caption is not UTF-8 text \(4\.png\)$",
    ):
        source = opened(tmp_path)
    assert sorted(numbers(source.batch(np.arange(2)))) == [0, 2]


def test_images_that_are_too_small_are_left_out_and_counted(folder: Path) -> None:
    (folder / "1.png").write_bytes(encoded(1, (30, 9)))
    (folder / "4.png").write_bytes(BROKEN)
    with pytest.warns(
        UserWarning, match=r"left out of 7 samples: 1 unreadable \(4\.png\), 1 below 10 pixels \(1\.png\)$"
    ):
        source = opened(folder, min_size=10)
    assert sorted(numbers(source.batch(np.arange(5)))) == [0, 2, 3, 5, 6]


def test_sizes_are_looked_up_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = opened(folder, min_size=10).batch(np.arange(7))
        monkeypatch.setattr("hypersd_jax.data.image_sizes.image_size", None)
        same(opened(folder, min_size=10).batch(np.arange(7)), first)


def test_a_mended_image_is_read_again_and_a_damaged_file_of_sizes_is_made_anew(folder: Path) -> None:
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(BROKEN)
    with pytest.warns(UserWarning, match="1 unreadable"):
        assert len(opened(folder, min_size=10)) == 6
    (folder / "3.png").write_bytes(whole)
    assert len(opened(folder, min_size=10)) == 7
    (kept,) = image_sizes.cache_folder().iterdir()
    kept.write_bytes(b"damaged")
    assert len(opened(folder, min_size=10)) == 7


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({}, r"7 unreadable \(\d\.png: not in a known image format"),
        ({"min_size": 11}, "7 below 11 pixels"),
        ({"min_size": 5}, "7 unreadable"),
    ],
)
def test_a_set_of_which_nothing_is_left_is_an_error(keys: dict[str, int], why: str, folder: Path) -> None:
    if "min_size" not in keys or keys["min_size"] < 10:
        for image in folder.glob("*.png"):
            image.write_bytes(BROKEN)
    with pytest.raises(UserError, match=rf"^data\.source: {folder}: none of its 7 samples can be used: {why}"):
        opened(folder, **keys)


def test_a_set_without_any_caption_is_an_error(folder: Path) -> None:
    rows = [json.dumps({"file_name": f"{number}.png", "text": None if number else ""}) for number in range(7)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match="none of its 7 samples can be used: 7 without caption"):
        opened(folder)


def test_sizes_and_random_crops(tmp_path: Path) -> None:
    """The red of an image is its column, so that the crop can be read off it."""
    image = np.zeros((8, 40, 3), np.uint8)
    image[..., 0] = 3 * np.arange(40)
    Image.fromarray(image).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("ramp")
    centre = opened(tmp_path).batch(np.arange(3))
    np.testing.assert_array_equal(centre.sizes, np.tile(np.float32([8, 40, 0, 16, 8, 8]), (3, 1)))
    batch = opened(tmp_path, crop="random", flip=True).batch(np.arange(200))
    reds = batch.images[:, 0, :, 0].astype(int) // 3
    flipped = reds[:, 0] > reds[:, 1]
    left = np.where(flipped, 39 - reds[:, 0], reds[:, 0])
    np.testing.assert_array_equal(batch.sizes[:, 3], left)
    np.testing.assert_array_equal(batch.sizes[:, [0, 1, 2, 4, 5]], np.tile(np.float32([8, 40, 0, 8, 8]), (200, 1)))
    assert set(left) == set(range(33))
    assert 70 < flipped.sum() < 130


@pytest.mark.filterwarnings("ignore:data.source")
def test_keys_find_the_pairs_again(damaged: Path) -> None:
    source = opened(damaged)
    np.testing.assert_array_equal(source.variants(), [0, 1, 4, 6])
    positions = np.arange(20)
    keys = source.keys(positions)
    assert keys.dtype == np.int64
    same(source.variant_batch(keys), source.batch(positions))
    assert source.captions(keys) == source.batch(positions).captions
    same(opened(damaged).batch(positions), source.batch(positions))
    with pytest.raises(UserError, match=f"{damaged}: 3.png cannot be read"):
        source.variant_batch(np.asarray([3]))


@pytest.mark.parametrize(("key", "value"), [("crop", "random"), ("flip", True)])
def test_what_changes_every_epoch_is_not_cached(key: str, value: object, folder: Path) -> None:
    assert opened(folder).uncacheable is None
    source = opened(folder, **{key: value})
    assert source.uncacheable.startswith(f"data.{key}=")
    with pytest.raises(UserError, match=f"data.{key}="):
        source.variant_batch(np.arange(2))


def test_one_caption_of_several_and_line_breaks(tmp_path: Path) -> None:
    texts = [["", f"{caption(0)}", "another"], [" picture\n 1 "]]
    parquet(tmp_path / "a.parquet", {"image": [encoded(0), encoded(1)], "caption": texts})
    assert sorted(numbers(opened(tmp_path).batch(np.arange(2)))) == [0, 1]
