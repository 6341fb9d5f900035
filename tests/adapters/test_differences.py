"""Differences in the weights: counted from the base, order-free, rounded once, and nothing else touched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.adapters import altered, delta, difference_delta

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def entry(scale: float = 1.0, **values: np.ndarray) -> dict[str, np.ndarray]:
    return {"scale": np.asarray(scale, np.float32), **values}


PARAMS = {
    "a.kernel": jnp.asarray(normal(6, 8)),
    "a.bias": jnp.asarray(normal(8)),
    "b.kernel": jnp.asarray(normal(3, 3, 4, 6)),
    "n.scale": jnp.asarray(normal(4)),
    "n.bias": jnp.asarray(normal(4)),
}
LOHA = entry(0.5, down=normal(6, 2), up=normal(2, 8), down_2=normal(6, 2), up_2=normal(2, 8))
LOKR = entry(0.7, left=normal(2, 3), right=normal(3, 3, 2, 2))
DORA = entry(0.6, down=normal(6, 2), up=normal(2, 8), magnitude=np.abs(normal(1, 8)) + 0.5)


def test_a_pair_of_factors_is_the_adapter_s_delta() -> None:
    down, up = normal(3, 3, 4, 2), normal(2, 6)
    expected = delta({"down": jnp.asarray(down), "up": jnp.asarray(up), "scale": jnp.full(2, 0.25)})
    np.testing.assert_allclose(difference_delta(entry(0.25, down=down, up=up)), expected, rtol=1e-6, atol=1e-7)


def test_the_kronecker_product_of_a_convolution_is_numpy_s() -> None:
    expected = 0.7 * np.stack(
        [[np.kron(LOKR["left"], LOKR["right"][i, j]) for j in range(3)] for i in range(3)]
    )  # each tap's (in, out)
    np.testing.assert_allclose(difference_delta(LOKR), expected, rtol=1e-6)


def test_only_what_changes_is_returned_and_the_base_stays() -> None:
    before = {name: np.array(value) for name, value in PARAMS.items()}
    changed = altered(PARAMS, [({"b": LOKR, "n": entry(2.0, bias=normal(4))}, 1.0)])
    assert changed.keys() == {"b.kernel", "n.bias"}
    for name, value in PARAMS.items():
        np.testing.assert_array_equal(value, before[name])
    assert altered(PARAMS, []) == {}


def test_scale_0_is_the_base_bit_for_bit() -> None:
    changed = altered(PARAMS, [({"a": DORA, "b": LOKR}, 0.0)])
    for name, value in changed.items():
        np.testing.assert_array_equal(value, PARAMS[name])


def test_several_are_each_counted_from_the_base_in_any_order() -> None:
    """So that two DoRAs, and a DoRA beside a LoHa, do not depend on which was loaded first."""
    stack = [({"a": DORA}, 0.8), ({"a": LOHA}, -0.5), ({"a": {**DORA, "up": normal(2, 8)}}, 1.3)]
    both, turned = altered(PARAMS, stack)["a.kernel"], altered(PARAMS, stack[::-1])["a.kernel"]
    base = np.asarray(PARAMS["a.kernel"], np.float64)
    alone = [np.asarray(altered(PARAMS, [(part, 1.0)])["a.kernel"], np.float64) - base for part, _ in stack]
    expected = base + sum(scale * change for (_, scale), change in zip(stack, alone, strict=True))
    np.testing.assert_allclose(both, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(turned, both, rtol=1e-6, atol=1e-6)
    assert np.abs(both - base).max() > 0.1


def test_a_merged_channel_of_zeros_stays_zero() -> None:
    """|W + delta| = 0 has no direction; dividing by it would spread NaN over every image."""
    full = -np.asarray(PARAMS["a.kernel"])
    changed = altered(PARAMS, [({"a": entry(full=full, magnitude=np.ones((1, 8), np.float32))}, 1.0)])
    np.testing.assert_array_equal(changed["a.kernel"], np.zeros((6, 8)))


def test_sums_are_rounded_once() -> None:
    params = {"a.kernel": PARAMS["a.kernel"].astype(jnp.bfloat16)}
    full = [1e-3 * normal(6, 8) for _ in range(3)]
    changed = altered(params, [({"a": entry(full=value)}, 1.0) for value in full])["a.kernel"]
    assert changed.dtype == jnp.bfloat16
    expected = (np.asarray(params["a.kernel"], np.float32) + full[0] + full[1] + full[2]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(changed), expected)


def test_the_user_s_scale_compiles_nothing() -> None:
    from hypersd_jax.adapters import differences

    altered(PARAMS, [({"a": LOHA}, 0.1)])
    compiled = differences._altered._cache_size()
    for scale in (0.2, 0.9, -1.0):
        altered(PARAMS, [({"a": LOHA}, scale)])
    assert differences._altered._cache_size() == compiled


def test_leaves_stay_where_they_were() -> None:
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", None))
    params = {"a.kernel": jax.device_put(PARAMS["a.kernel"], sharding)}
    assert altered(params, [({"a": LOHA}, 1.0)])["a.kernel"].sharding == sharding


@pytest.mark.parametrize(("path", "name"), [("nowhere", r"nowhere\.kernel"), ("b", r"b\.bias")])
def test_an_unknown_parameter_is_named(path: str, name: str) -> None:
    with pytest.raises(KeyError, match=name):
        altered(PARAMS, [({path: entry(full=normal(6, 8)) if path == "nowhere" else entry(bias=normal(6))}, 1.0)])
