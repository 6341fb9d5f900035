from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from hypersd_jax.evaluation import (
    feature_distance,
    frechet_distance,
    image_distance,
    kernel_distance,
    mean_estimate,
    paired_margin,
)


def textbook_frechet(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * np.real(root)))


@pytest.mark.parametrize(("n", "m"), [(200, 300), (50, 12), (9, 7)])
def test_frechet_is_the_textbook_formula(n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(8, 8))
    a, b = rng.normal(size=(n, 8)) @ mixing, rng.normal(0.3, 1.2, size=(m, 8))
    # sqrtm of the singular product is good to about 1e-7 only.
    tolerance = 1e-10 if min(n, m) > 8 else 1e-5
    assert frechet_distance(a, b) == pytest.approx(textbook_frechet(a, b), rel=tolerance)


def test_frechet_with_fewer_samples_than_features() -> None:
    a = np.random.default_rng(1).normal(size=(40, 300))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, a + 0.5) == pytest.approx(300 * 0.25, rel=1e-9)


def test_frechet_of_one_dimension_is_the_closed_form() -> None:
    a, b = np.array([[0.0], [2.0]]), np.array([[5.0], [5.0 + 2 * np.sqrt(2)]])
    assert frechet_distance(a, b) == pytest.approx((4 + np.sqrt(2)) ** 2 + 2 + 4 - 2 * np.sqrt(8))


def test_kernel_distance_is_unbiased() -> None:
    rng = np.random.default_rng(2)
    found = [kernel_distance(rng.normal(size=(30, 5)), rng.normal(size=(40, 5))) for _ in range(400)]
    values = np.array(found)[:, 0]
    assert (values < 0).any()
    assert (values > 0).any()
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))


def test_kernel_distance_by_loops() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_a = np.mean([k(a[i], a[j]) for i in range(4) for j in range(4) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    across = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b).mean == pytest.approx(within_a + within_b - 2 * across, rel=1e-12)


def test_kernel_distance_tells_sets_apart() -> None:
    rng = np.random.default_rng(4)
    found = [kernel_distance(rng.normal(size=(60, 5)), rng.normal(1.0, 1.0, size=(50, 5))) for _ in range(200)]
    values, errors = np.array(found).T
    assert values.mean() > 3 * values.std()
    # The jackknife's error is the spread that is really there.
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.15)


def test_image_distance_is_in_the_unit_range() -> None:
    black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 255, np.uint8)
    np.testing.assert_allclose(image_distance(black, white), [1.0, 1.0])
    np.testing.assert_allclose(image_distance(black, np.full((2, 4, 4, 3), 0.25)), [0.25, 0.25])
    with pytest.raises(ValueError, match="one shape"):
        image_distance(black, white[:1])


def test_feature_distance_is_euclidean() -> None:
    np.testing.assert_allclose(feature_distance(np.zeros((1, 2)), np.array([[3.0, 4.0]])), [5.0])


def test_margin_takes_out_what_the_prompts_share() -> None:
    rng = np.random.default_rng(5)
    shared = rng.normal(size=200) * 10
    margin = paired_margin(shared, shared + 1 + 0.1 * rng.normal(size=200))
    assert margin.mean == pytest.approx(1.0, abs=0.03)
    assert margin.standard_error == pytest.approx(0.1 / np.sqrt(200), rel=0.2)


def test_mean_estimate() -> None:
    estimate = mean_estimate(np.array([1.0, 2.0, 3.0]))
    assert estimate == pytest.approx((2.0, 1 / np.sqrt(3)))
    assert np.isnan(mean_estimate(np.array([1.0])).standard_error)


def test_too_few_features_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        frechet_distance(np.zeros((1, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        kernel_distance(np.zeros((5, 3)), np.zeros((5, 2)))


def test_samples_of_one_prompt_are_one_unit() -> None:
    """By hand: equal groups are a mean over the groups' means; groups of one are the usual error."""
    values = np.random.default_rng(0).normal(size=12)
    units = np.arange(12) % 4
    means = np.asarray([values[units == unit].mean() for unit in range(4)])
    found = mean_estimate(values, units)
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(means.std(ddof=1) / 2)
    assert mean_estimate(values, np.arange(12)) == pytest.approx(mean_estimate(values))
    assert np.isnan(mean_estimate(values, np.zeros(12)).standard_error)
    assert paired_margin(values, 2 * values, units) == pytest.approx(found)
