"""The closest adapter of a rank, against the singular values of NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from hypersd_jax.adapters import delta, low_rank, reduced

SHAPES = [(12, 40), (40, 12), (3, 3, 5, 20), (1, 1, 16, 16)]


def change(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Singular values that fall by a half each."""
    rng = np.random.default_rng(seed)
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    size = min(rows, columns)
    left = np.linalg.qr(rng.normal(size=(rows, size)))[0]
    right = np.linalg.qr(rng.normal(size=(columns, size)))[0]
    return ((left * 0.5 ** np.arange(size)) @ right.T).reshape(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 500])
def test_the_error_is_that_of_the_left_out_singular_values(shape: tuple[int, ...], rank: int) -> None:
    whole = change(shape)
    values = np.linalg.svd(whole.reshape(-1, shape[-1]).astype(np.float64), compute_uv=False)
    entry, kept, total = low_rank(whole, rank)
    assert entry["down"].shape == (*shape[:-1], min(rank, len(values)))
    assert entry["up"].shape == (min(rank, len(values)), shape[-1])
    assert all(value.dtype == np.float32 for value in entry.values())
    error = np.linalg.norm(np.asarray(delta(entry), np.float64) - whole)
    assert error == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-4, abs=2e-7)
    assert total == pytest.approx(np.sum(values**2), rel=1e-9)
    assert kept == pytest.approx(np.sum(values[:rank] ** 2), rel=1e-9)


def test_both_factors_carry_the_root_of_the_singular_value() -> None:
    entry = low_rank(100 * change((12, 40)), 4).entry
    expected = np.sqrt(100 * 0.5 ** np.arange(4))
    np.testing.assert_allclose(np.linalg.norm(entry["down"], axis=0), expected, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(entry["up"], axis=1), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_reduced_as_their_product_is(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    entry = {
        "down": rng.normal(size=(*shape[:-1], 30)).astype(np.float32),
        "up": rng.normal(size=(30, shape[-1])).astype(np.float32),
        "scale": rng.normal(size=30).astype(np.float32),
    }
    whole = np.asarray(delta(entry))
    for ours, theirs in ((reduced(entry, 3), low_rank(whole, 3)), (reduced(entry, None), low_rank(whole, 99))):
        assert ours.kept == pytest.approx(theirs.kept, rel=1e-5)
        assert ours.total == pytest.approx(theirs.total, rel=1e-5)
        np.testing.assert_allclose(delta(ours.entry), delta(theirs.entry), rtol=0, atol=1e-5 * np.abs(whole).max())
    assert reduced(entry, None).entry == entry


def test_no_change_at_all_and_one_of_low_rank() -> None:
    entry, kept, total = low_rank(np.zeros((6, 5), np.float32), 2)
    assert (kept, total) == (0, 0)
    np.testing.assert_array_equal(delta(entry), np.zeros((6, 5)))
    single = np.outer(np.arange(6), np.arange(5)).astype(np.float32)
    np.testing.assert_allclose(delta(low_rank(single, 4).entry), single, rtol=1e-5, atol=1e-5)
