"""The structure term's targets: in the frame of the images that a source crops and mirrors, and of crowded images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersd_jax.config import DataConfig
from hypersd_jax.data import Source, open_source
from hypersd_jax.data.instances import read_annotations
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.instance_targets import instance_targets
from hypersd_jax.inputs.structure import LEFT_OUT, TARGETS, reading, targets_of
from tests.helpers.instances import NETWORK, annotated_folder, content

SIZE = (40, 56)
BOXES = [
    [(4, 4, 20, 16), (20, 24, 12, 28)],
    [(10, 30, 24, 20)],
    [(0, 0, 40, 14), (8, 20, 24, 24)],
    [],
]
ROOM = {"positives": 128, "instances": 4}


def read_all(source: Source, folder: Path, batch: Any, **room: int) -> Any:
    annotations = read_annotations(str(folder / "instances.json"))
    assert source.files is not None
    images = {key: image for key, name in source.files.items() if (image := annotations.image(name))}
    return reading(images, source.files, NETWORK, **{**ROOM, **room})(batch.captions, batch)


def enlarged(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(pixels.astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
    return np.asarray(image).astype(bool)


@pytest.mark.parametrize("changes", [{}, {"crop": "random", "flip": True}, {"bucket_step": 16}])
def test_the_masks_lie_where_the_pixels_are(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Red is an image's first instance, green its second; the network sees 16 x 16 pixels as 32 x 32."""
    folder = annotated_folder(tmp_path, SIZE, BOXES)
    side = 64 if changes.get("bucket_step") else 16
    source = open_source(DataConfig(source=str(folder / "images"), **changes), resolution=side, seed=0, batch_size=3)
    mirrored, seen = [], 0
    for start in range(0, 12, 3):
        batch = source.batch(np.arange(start, start + 3))
        assert batch.mirrored is not None
        mirrored += batch.mirrored.tolist()
        found = read_all(source, folder, batch)
        targets = found[TARGETS]
        size = tuple(4 * side for side in targets.masks.shape[2:])
        assert size == ((64, 96) if "bucket_step" in changes else (32, 32))
        assert targets.masks.shape[:2] == (3, 4)
        assert found[LEFT_OUT].tolist() == [0, 0, 0]
        for index in range(3):
            # Largest first, as far as they are in the crop.
            shares = [enlarged(batch.images[index, ..., channel] > 127, size) for channel in range(2)]
            wanted = sorted((share for share in shares if share.any()), key=lambda each: -each.sum())
            masks = targets.masks[index]
            assert np.count_nonzero(masks.any(axis=(1, 2))) == len(wanted)
            for mask, share in zip(masks, wanted, strict=False):
                rows, columns = (length // 4 for length in share.shape)
                blocks = share.reshape(rows, 4, columns, 4).mean(axis=(1, 3))
                assert np.abs(mask - blocks).mean() < 0.04
                seen += 1
            cells = targets.classes[index][targets.weights[index] > 0]
            assert set(cells) <= {channel for channel in range(2) if shares[channel].any()}
    assert seen > 12
    assert any(mirrored) == bool(changes.get("flip"))


def boxes(*corners: tuple[int, int, int, int]) -> np.ndarray:
    masks = np.zeros((len(corners), 64, 64), bool)
    for mask, (top, left, height, width) in zip(masks, corners, strict=True):
        mask[top : top + height, left : left + width] = True
    return masks


MASKS = boxes((0, 0, 4, 4), (0, 0, 0, 0), (10, 10, 30, 30), (20, 40, 12, 12))


def test_the_largest_instances_come_first() -> None:
    found, left_out = targets_of([2, 1, 0, 1], MASKS, NETWORK, **ROOM)
    grids: Any = {"grids": NETWORK.grids, "scale_ranges": NETWORK.scale_ranges}
    wanted = instance_targets([0, 1, 2], MASKS[[2, 3, 0]], **grids, **ROOM)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert left_out == 0


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        ({"instances": 2}, 2),
        ({"instances": 1}, 1),
        ({"positives": 1}, 0),
    ],
)
def test_what_there_is_no_room_for_is_counted(room: dict[str, int], kept: int) -> None:
    found, left_out = targets_of([2, 1, 0, 1], MASKS, NETWORK, **{**ROOM, **room})
    assert left_out == 3 - kept
    assert np.count_nonzero(np.any(found.masks, axis=(1, 2))) == kept
    assert bool(np.any(found.weights)) == bool(kept)


def test_the_room_for_cells_is_used_up() -> None:
    """One cell less than two instances take leaves room for the first."""
    two, _ = targets_of([0, 1], MASKS[2:], NETWORK, **ROOM)
    cells = int(np.sum(two.weights))
    for positives, left_out in ((cells, 0), (cells - 1, 1)):
        assert targets_of([0, 1], MASKS[2:], NETWORK, positives=positives, instances=4)[1] == left_out


def test_an_image_without_instances_has_no_positive_cell() -> None:
    found, left_out = targets_of([], np.zeros((0, 32, 32), bool), NETWORK, **ROOM)
    assert not np.any(found.weights)
    assert left_out == 0


def test_annotations_of_a_turned_image_are_refused(tmp_path: Path) -> None:
    folder = annotated_folder(tmp_path, SIZE, BOXES)
    (folder / "instances.json").write_text(json.dumps(content(SIZE[::-1], BOXES)))
    source = open_source(DataConfig(source=str(folder / "images")), resolution=16, seed=0)
    with pytest.raises(UserError, match=r"data.source: \d.png has 56 x 40 pixels, but 40 x 56 in the annotations"):
        read_all(source, folder, source.batch(np.arange(1)))
