from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest

from hypersd_jax.config import DataConfig
from hypersd_jax.data import ImageTextSource, open_source
from hypersd_jax.data.buckets import Stream, bucket_sizes, nearest_bucket
from hypersd_jax.errors import UserError
from tests.helpers.image_sets import encoded, numbers, with_metadata


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (1024, 64), (1024, 32), (64, 8)])
def test_buckets_have_about_the_squares_area(resolution: int, step: int) -> None:
    buckets = bucket_sizes(resolution, step)
    assert (resolution, resolution) in buckets
    assert sorted((width, height) for height, width in buckets) == buckets
    for height, width in buckets:
        assert height % step == width % step == 0
        assert 0.9 * resolution**2 <= height * width <= resolution**2
        assert 0.5 <= height / width <= 2.0
    assert len(buckets) >= 5


def test_sdxl_buckets() -> None:
    wide = [(h, w) for h, w in bucket_sizes(1024, 64) if h <= w]
    assert wide == [(704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)]
    with pytest.raises(ValueError, match="bucket_step=64 must divide the resolution 1000"):
        bucket_sizes(1000, 64)


def test_the_nearest_bucket_is_by_aspect() -> None:
    buckets = bucket_sizes(1024, 64)
    sizes = np.asarray([[100, 100], [300, 100], [1344, 768], [480, 640], [1, 1000]])
    found = [buckets[index] for index in nearest_bucket(sizes, buckets)]
    assert found == [(1024, 1024), (1408, 704), (1344, 768), (896, 1152), (704, 1408)]


@pytest.mark.parametrize(("counts", "size"), [([7, 5, 1], 2), ([20, 3, 11, 2], 4), ([3, 2], 8), ([10], 4)])
def test_batches_are_of_one_group_and_nothing_is_lost(counts: list[int], size: int) -> None:
    """Every group's stream is gone through in order, without a gap, whatever the batches' order."""
    stream = Stream(counts, size, seed=5)
    total = 60 * size
    groups, offsets = stream.locate(np.arange(total))
    if len(counts) > 1:
        assert all(len(set(batch)) == 1 for batch in groups.reshape(-1, size))
    for group in range(len(counts)):
        mine = offsets[groups == group]
        np.testing.assert_array_equal(np.sort(mine), np.arange(len(mine)))
        share = total * counts[group] / sum(counts)
        assert abs(len(mine) - share) < size + counts[group]
    again, where = Stream(counts, size, seed=5).locate(np.arange(total)[::-7])
    np.testing.assert_array_equal(again, groups[::-7])
    np.testing.assert_array_equal(where, offsets[::-7])


def test_groups_are_mixed_and_each_epoch_anew() -> None:
    stream = Stream([32, 32], 4, seed=0)
    orders = [tuple(stream.locate(np.arange(0, 64, 4) + 64 * epoch)[0]) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == [0] * 8 + [1] * 8 for order in orders)


def test_every_item_once_in_a_groups_epoch_also_when_stepping_on() -> None:
    stream = Stream([5, 3], 2, seed=1)
    first = [stream.item(0, offset) for offset in range(5)]
    assert sorted(first) == list(range(5))
    assert [stream.item(0, 2, after) for after in range(5)] == first[2:] + first[:2]


SHAPES = {0: (40, 40), 1: (40, 60), 2: (60, 40)}
TARGETS = {0: (64, 64), 1: (48, 80), 2: (80, 48)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with_metadata(tmp_path, range(12))
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(encoded(number, SHAPES[number % 3]))
    return tmp_path


def opened(folder: Path, batch_size: int | None = 3, step: int = 16) -> ImageTextSource:
    config = DataConfig(source=str(folder), bucket_step=step)
    found = open_source(config, resolution=64, seed=0, batch_size=batch_size)
    assert isinstance(found, ImageTextSource)
    return found


def test_batches_of_images_in_buckets(folder: Path) -> None:
    source = opened(folder)
    seen: collections.Counter[int] = collections.Counter()
    for number in range(4 * 6):
        batch = source.batch(3 * number + np.arange(3))
        found = numbers(batch)
        kind = found[0] % 3
        assert batch.images.shape == (3, *TARGETS[kind], 3)
        for size in batch.sizes:
            assert tuple(size[:2]) == SHAPES[kind]
            assert tuple(size[4:]) == TARGETS[kind]
        # Processes that take a row each get this batch's rows.
        rows = [opened(folder).batch(np.asarray([3 * number + row])) for row in range(3)] if number < 3 else []
        for row, alone in enumerate(rows):
            np.testing.assert_array_equal(alone.images[0], batch.images[row])
        seen.update(found)
    assert seen == dict.fromkeys(range(12), 6)


@pytest.mark.filterwarnings("ignore:data.source")
def test_what_stands_in_is_of_the_same_bucket(folder: Path) -> None:
    source = opened(folder)
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[:40])  # the header is whole, the pixels are not
    found = [numbers(source.batch(3 * number + np.arange(3))) for number in range(8)]
    assert all(len({each % 3 for each in batch}) == 1 for batch in found)
    assert {each for batch in found for each in batch} == set(range(12)) - {4}


@pytest.mark.filterwarnings("ignore:data.source")
def test_a_bucket_of_which_nothing_can_be_read_is_filled_from_others(folder: Path) -> None:
    for number in (1, 4, 7, 10):
        path = folder / f"{number}.png"
        path.write_bytes(path.read_bytes()[:50])
    source = opened(folder)
    shapes = collections.Counter()
    for number in range(8):
        batch = source.batch(3 * number + np.arange(3))
        shapes[batch.images.shape[1:3]] += 1
        assert not {each % 3 for each in numbers(batch)} & {1}
    assert set(shapes) == set(TARGETS.values())


def test_what_buckets_ask_for(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.bucket_step: .* same batch_size"):
        opened(folder, batch_size=None)
    with pytest.raises(UserError, match=r"data\.bucket_step=24 must divide the resolution 64"):
        opened(folder, step=24)
    source = opened(folder)
    with pytest.raises(UserError, match="whole batches only"):
        source.batch(np.arange(30))
    assert source.uncacheable.startswith("data.bucket_step")
