"""Precision and recall against loops, the error against the spread that is there, and what they tell apart."""

from __future__ import annotations

import numpy as np
import pytest

from hypersd_jax.evaluation import COLUMNS, Measured
from hypersd_jax.evaluation.neighbours import FEWEST, NEIGHBOURS, covered_share


def share_by_loops(points: np.ndarray, support: np.ndarray) -> float:
    """Equation 1, word for word."""
    inside = []
    for point in points:
        found = False
        for index, member in enumerate(support):
            others = sorted(np.linalg.norm(member - other) for j, other in enumerate(support) if j != index)
            found = found or np.linalg.norm(point - member) <= others[NEIGHBOURS - 1]
        inside.append(found)
    return float(np.mean(inside))


def error_by_loops(points: np.ndarray, support: np.ndarray) -> float:
    """The two-sample jackknife: each member of either set left out in turn."""
    without_points = [share_by_loops(np.delete(points, i, 0), support) for i in range(len(points))]
    without_support = [share_by_loops(points, np.delete(support, i, 0)) for i in range(len(support))]
    parts = [(len(values) - 1) * np.var(values) for values in (without_points, without_support)]
    return float(np.sqrt(sum(parts)))


@pytest.mark.parametrize(("n", "m", "apart"), [(14, 9, 0.5), (8, 13, 2.0), (FEWEST, FEWEST, 0.0)])
def test_share_and_error_are_those_of_the_loops(n: int, m: int, apart: float) -> None:
    rng = np.random.default_rng(n)
    points, support = rng.normal(apart, 1.0, size=(n, 3)), rng.normal(size=(m, 3))
    found = covered_share(points, support)
    assert found.mean == pytest.approx(share_by_loops(points, support), abs=1e-12)
    assert found.standard_error == pytest.approx(error_by_loops(points, support), abs=1e-12)


def test_the_error_is_on_the_safe_side() -> None:
    """Of a share that depends on a set's nearest neighbours the jackknife's error is larger than the spread."""
    rng = np.random.default_rng(0)
    found = [covered_share(rng.normal(1.0, 1.0, size=(60, 4)), rng.normal(size=(50, 4))) for _ in range(300)]
    values, errors = np.array(found).T
    assert 1.0 < np.sqrt(np.mean(errors**2)) / values.std() < 1.5


def test_what_is_far_away_is_not_covered_and_the_set_itself_is() -> None:
    rng = np.random.default_rng(1)
    support = rng.normal(size=(20, 6))
    assert covered_share(support + 100.0, support) == (0.0, 0.0)
    assert covered_share(support, support).mean == 1.0


def test_a_model_with_one_good_image_has_precision_and_no_recall() -> None:
    rng = np.random.default_rng(2)
    real = rng.normal(size=(40, 6))
    same = real[0] + 1e-3 * rng.normal(size=(30, 6))
    found = Measured(prompts=(), images=np.zeros((30, 2, 2, 3), np.uint8), features=same, real=real)
    precision, recall = (COLUMNS[key].measure for key in ("precision", "recall"))
    assert precision is not None
    assert recall is not None
    assert precision(found) == covered_share(same, real)
    assert precision(found)[0] == 1.0  # type: ignore[index]
    assert recall(found) == covered_share(real, same)
    assert recall(found)[0] <= 1 / 40  # type: ignore[index]


def test_too_few_features() -> None:
    with pytest.raises(ValueError, match="4 features are too few: at least 5"):
        covered_share(np.zeros((9, 2)), np.zeros((4, 2)))
    few = Measured(
        prompts=(), images=np.zeros((4, 2, 2, 3), np.uint8), features=np.zeros((4, 2)), real=np.zeros((9, 2))
    )
    assert COLUMNS["recall"].measure is not None
    assert COLUMNS["recall"].measure(few) is None
