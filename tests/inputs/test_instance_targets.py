"""Instances of images assigned to the cells of SOLO's grids, on examples made by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from hypersd_jax.inputs.instance_targets import instance_targets, positive_cells

GRIDS = (8, 4)
RANGES = ((1, 16), (16, 64))
SIZES = {"grids": GRIDS, "scale_ranges": RANGES}
SECOND = 8 * 8


def box(top, left, height, width, shape=(64, 64)):
    mask = np.zeros(shape, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def cell(row, column, side=8, offset=0):
    return offset + row * side + column


def assigned(*masks, classes=None):
    classes = list(range(len(masks))) if classes is None else classes
    return positive_cells(classes, np.stack(masks), **SIZES)


def test_a_small_instance_within_one_cell():
    """4 x 4 pixels in the middle of an 8 x 8 cell, row 2, column 5: the region ends within it."""
    found = assigned(box(18, 42, 4, 4), classes=[7])
    assert found.cells.tolist() == [cell(2, 5)]
    assert found.classes.tolist() == [7]
    assert found.instances.tolist() == [0]


def test_a_centre_on_a_corner_has_the_cells_around():
    """10 x 10 pixels around (24, 40): its region of 2 pixels meets four cells."""
    found = assigned(box(19, 35, 10, 10))
    assert found.cells.tolist() == [cell(row, column) for row in (2, 3) for column in (4, 5)]


@pytest.mark.parametrize(
    ("height", "width", "levels"), [(4, 63, (0,)), (16, 16, (0, 1)), (17, 17, (1,)), (32, 32, (1,)), (2, 2, (0,))]
)
def test_levels_by_the_size_of_the_box(height, width, levels):
    """The root of height times width: 15.9, 16 (an end of both ranges), 17 and so on."""
    found = assigned(box(0, 0, height, width))
    assert {int(index >= SECOND) for index in found.cells} == set(levels)


def test_the_box_counts_and_the_centre_of_mass():
    """An L of lines one pixel wide: its box is 40 x 40, its mass is at the lower left, and so are its cells."""
    mask = box(4, 4, 40, 1) | box(43, 4, 1, 40)
    found = assigned(mask)
    # The centre is (33.6, 14.4), in cell (2, 0) of 16 x 16 pixels; the region reaches 4 pixels around it.
    wanted = [cell(row, column, 4, SECOND) for row in (1, 2) for column in (0, 1)]
    assert found.cells.tolist() == wanted


def test_never_more_than_the_neighbours():
    """A grid so fine that a fifth of the instance spans 13 cells."""
    found = positive_cells([0], box(0, 0, 64, 64)[None], grids=(64,), scale_ranges=((1, 64),))
    middle = [cell(row, column, 64) for row in (31, 32, 33) for column in (31, 32, 33)]
    assert found.cells.tolist() == middle


def test_at_the_edge_of_the_image():
    """Nearly all of its mass lies in the first row, so that the region reaches beyond the image."""
    mask = box(0, 0, 1, 64) | box(0, 0, 60, 1)
    mask[0:2] = True
    found = assigned(mask)
    rows = {int(index - SECOND) // 4 for index in found.cells}
    assert rows == {0, 1}
    corner = assigned(box(62, 62, 2, 2))
    assert corner.cells.tolist() == [cell(7, 7)]


def test_sides_of_an_image_count_apart():
    """In 32 x 64 pixels a cell is 4 pixels high and 8 wide."""
    found = assigned(box(9, 34, 2, 4, shape=(32, 64)))
    assert found.cells.tolist() == [cell(2, 4)]


def test_of_two_in_one_cell_the_later_has_it():
    first, second = box(18, 42, 4, 4), box(17, 41, 5, 5)
    found = assigned(first, second, classes=[4, 9])
    assert (found.cells.tolist(), found.classes.tolist(), found.instances.tolist()) == ([cell(2, 5)], [9], [1])


def test_instances_without_pixels_or_level():
    found = assigned(np.zeros((64, 64), bool), box(0, 0, 64, 64), box(2, 2, 4, 4))
    assert set(found.instances.tolist()) == {1, 2}
    assert assigned(np.zeros((64, 64), bool)).cells.size == 0


def test_padding():
    masks = np.stack([box(18, 42, 4, 4), box(19, 35, 10, 10)]).astype(np.uint8)
    found = instance_targets([5, 6], masks, **SIZES, positives=8, instances=3)
    cells = [cell(2, 4), cell(2, 5), cell(3, 4), cell(3, 5)]
    assert found.cells.tolist() == [*cells, 0, 0, 0, 0]
    assert found.classes.tolist() == [6, 6, 6, 6, 0, 0, 0, 0]
    assert found.instances.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert found.weights.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert found.masks.shape == (3, 16, 16)
    # Rows 18 to 21 and columns 42 to 45 are half a block of four on each side.
    np.testing.assert_array_equal(found.masks[0, 4:6, 10:12], [[0.25, 0.25], [0.25, 0.25]])
    assert found.masks.sum(axis=(1, 2)).tolist() == [1.0, 100 / 16, 0.0]
    assert {leaf.dtype.name for leaf in found} == {"int32", "float32"}


def test_images_of_a_batch_go_together():
    """With and without instances."""
    kinds = ([], np.zeros((0, 64, 64), bool)), ([1], box(18, 42, 4, 4)[None])
    found = [instance_targets(*each, **SIZES, positives=4, instances=2) for each in kinds]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    assert [leaf.shape for leaf in batch] == [(2, 4), (2, 4), (2, 4), (2, 4), (2, 2, 16, 16)]
    assert batch.weights.sum(axis=1).tolist() == [0.0, 1.0]


def test_what_does_not_fit():
    masks = np.stack([box(18, 42, 4, 4), box(19, 35, 10, 10)])
    with pytest.raises(ValueError, match="4 positive cells of 2 instances, but there is room for 3 of 2"):
        instance_targets([0, 1], masks, **SIZES, positives=3, instances=2)
    with pytest.raises(ValueError, match="room for 8 of 1"):
        instance_targets([0, 1], masks, **SIZES, positives=8, instances=1)
    with pytest.raises(ValueError, match=r"\(1,\) classes"):
        instance_targets([0], masks, **SIZES, positives=8, instances=2)
