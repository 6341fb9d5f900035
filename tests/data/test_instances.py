"""Annotations in COCO's format: what is read, left out and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypersd_jax.data.instances import read_annotations
from hypersd_jax.errors import UserError
from tests.helpers.instances import content

SIZE = (4, 6)
BOXES = [[(0, 1, 2, 3), (2, 0, 2, 6)], []]


def written(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> str:
    found = content(SIZE, BOXES)
    change(found)
    (folder / "instances.json").write_text(json.dumps(found))
    return str(folder / "instances.json")


def test_categories_are_numbered_by_their_ids_and_images_found_by_name(tmp_path: Path) -> None:
    found = read_annotations(written(tmp_path))
    assert (found.categories, found.crowds, sorted(found.images)) == (3, 0, ["0.png", "1.png"])
    image = found.image("train2017/0.png")
    assert image is not None
    assert (image.height, image.width, [each.category for each in image.instances]) == (4, 6, [0, 1])
    for instance, (top, left, height, width) in zip(image.instances, BOXES[0], strict=True):
        wanted = np.zeros(SIZE, bool)
        wanted[top : top + height, left : left + width] = True
        np.testing.assert_array_equal(instance.mask(*SIZE), wanted)
    empty = found.image("1.png")
    assert empty is not None
    assert empty.instances == ()
    assert found.image("2.png") is None


@pytest.mark.parametrize("counts", [[1, 2, 21], "12e0"])
def test_run_lengths_are_of_the_first_column(tmp_path: Path, counts: Any) -> None:
    path = written(
        tmp_path, lambda it: it["annotations"][0].update(segmentation={"counts": counts, "size": list(SIZE)})
    )
    image = read_annotations(path).image("0.png")
    assert image is not None
    wanted = np.zeros(SIZE, bool)
    wanted[1:3, 0] = True
    np.testing.assert_array_equal(image.instances[0].mask(*SIZE), wanted)


def test_crowds_are_left_out_and_counted(tmp_path: Path) -> None:
    found = read_annotations(written(tmp_path, lambda it: it["annotations"][0].update(iscrowd=1)))
    image = found.image("0.png")
    assert image is not None
    assert (found.crowds, [each.category for each in image.instances]) == (1, [1])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda it: it.pop("categories"), "'categories' is missing, or is no id that it lists"),
        (lambda it: it["annotations"][0].update(category_id=7), "7 is missing, or is no id that it lists"),
        (lambda it: it["annotations"][0].update(image_id=1), "1 is missing, or is no id that it lists"),
        (lambda it: it["annotations"][0].update(segmentation=[[1, 2, 3]]), "cannot reshape array of size 3"),
        (lambda it: it["annotations"][0].update(segmentation=[[1, float("nan")]]), "numbers are not finite"),
        (
            lambda it: it["annotations"][0].update(segmentation={"counts": [20, 5], "size": [4, 6]}),
            "run lengths of [4, 6] pixels in an image of [4, 6]",
        ),
        (
            lambda it: it["annotations"][0].update(segmentation={"counts": [20, 4], "size": [6, 4]}),
            "run lengths of [6, 4] pixels in an image of [4, 6]",
        ),
        (lambda it: it["annotations"][0].update(segmentation={"counts": "5o", "size": [4, 6]}), "within a number"),
        (lambda it: it["images"][1].update(file_name="b/0.png"), "several images are called 0.png"),
        (lambda it: it["images"][1].update(height=0), "height or width is below 1"),
        (lambda it: it.update(annotations=["a"]), "COCO's format"),
    ],
)
def test_a_file_that_is_not_in_the_format(tmp_path: Path, change: Callable[[dict[str, Any]], Any], line: str) -> None:
    path = written(tmp_path, change)
    with pytest.raises(UserError) as raised:
        read_annotations(path)
    assert line in str(raised.value)
    assert str(raised.value).startswith(f"{path}: is not in COCO's format: ")
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"images": [')
    for name, line in (("none.json", "no such file"), ("half.json", "not valid JSON")):
        with pytest.raises(UserError, match=f"{name}.*{line}"):
            read_annotations(str(tmp_path / name))
