"""Adapters as trees: what is adapted, how one starts, and that combining and padding keep the delta."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax import adapters
from hypersd_jax.errors import UserError
from hypersd_jax.weights.families import FAMILIES, adaptable_shapes

SHAPES = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in {
        "conv_in.kernel": (3, 3, 4, 8),
        "down_blocks.0.resnets.0.conv1.kernel": (3, 3, 8, 16),
        "down_blocks.0.resnets.0.conv1.bias": (16,),
        "down_blocks.0.resnets.0.norm1.scale": (8,),
        "down_blocks.0.attentions.0.proj_in.kernel": (16, 16),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.kernel": (16, 12),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.kernel": (12, 16),
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.kernel": (64, 16),
        "down_blocks.0.attentions.0.transformer_blocks.0.not_ff.net.2.kernel": (64, 16),
    }.items()
}
CONV = "down_blocks.0.resnets.0.conv1"
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def random_adapter(seed: int, rank: int, targets: tuple[str, ...] = adapters.TARGETS_14) -> adapters.Adapter:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    adapter = {}
    for path in adapters.target_paths(SHAPES, targets):
        *window, fan_out = SHAPES[path + ".kernel"].shape
        adapter[path] = {"down": normal(*window, rank), "up": normal(rank, fan_out), "scale": normal(rank)}
    return adapter


def random_params(dtype: jnp.dtype, scale: float = 1.0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(7)
    return {path: jnp.asarray(scale * rng.normal(size=leaf.shape), dtype) for path, leaf in SHAPES.items()}


@jax.jit
def deltas(adapter: adapters.Adapter) -> dict[str, jax.Array]:
    return {path: adapters.delta(entry) for path, entry in adapter.items()}


def test_targets_match_whole_path_components_of_modules_with_kernels() -> None:
    assert adapters.target_paths(SHAPES) == [
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
    ]
    assert adapters.target_paths(SHAPES, ("norm1",)) == []
    assert len(adapters.TARGETS_14) == len(set(adapters.TARGETS_14)) == 14


def test_init_is_jittable_and_starts_at_zero_delta() -> None:
    adapter = jax.jit(lambda key: adapters.init(key, SHAPES, rank=4, alpha=8.0))(jax.random.key(0))
    assert adapter[CONV]["down"].shape == (3, 3, 8, 4)
    assert adapter[CONV]["up"].shape == (4, 16)
    assert adapter[LINEAR]["down"].shape == (16, 4)
    assert adapter[LINEAR]["up"].shape == (4, 12)
    for path, entry in adapter.items():
        assert all(leaf.dtype == jnp.float32 for leaf in entry.values())
        np.testing.assert_array_equal(entry["scale"], np.full(4, 2.0))
        assert not np.any(entry["up"]), path
    bound = 1 / np.sqrt(3 * 3 * 8)  # the fan-in of a convolution counts its window
    down = np.asarray(adapter[CONV]["down"])
    assert np.abs(down).max() <= bound
    assert down.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)


def test_default_alpha_is_the_rank_and_values_depend_on_the_path_alone() -> None:
    whole = adapters.init(jax.random.key(3), SHAPES, rank=4)
    part = adapters.init(jax.random.key(3), SHAPES, rank=4, targets=("to_q",))
    np.testing.assert_array_equal(whole[LINEAR]["scale"], np.ones(4))
    np.testing.assert_array_equal(whole[LINEAR]["down"], part[LINEAR]["down"])
    other = adapters.init(jax.random.key(4), SHAPES, rank=4)
    assert not np.array_equal(whole[LINEAR]["down"], other[LINEAR]["down"])


@pytest.mark.parametrize("arguments", [{"rank": 4, "targets": ("to_nothing",)}, {"rank": 0}])
def test_init_refuses_what_adapts_nothing(arguments: dict) -> None:
    with pytest.raises(UserError, match="LoRA"):
        adapters.init(jax.random.key(0), SHAPES, **arguments)


def test_delta_is_the_sum_over_the_rank() -> None:
    adapter = random_adapter(0, rank=3)
    for path, expression in ((LINEAR, "ir,r,ro->io"), (CONV, "hwir,r,ro->hwio")):
        entry = {name: np.asarray(leaf, np.float64) for name, leaf in adapter[path].items()}
        expected = np.einsum(expression, entry["down"], entry["scale"], entry["up"])
        np.testing.assert_allclose(adapters.delta(adapter[path]), expected, rtol=1e-5, atol=1e-5)


def test_scaled_scales_the_delta() -> None:
    adapter = random_adapter(0, rank=3)
    for path, delta in deltas(adapters.scaled(adapter, -0.5)).items():
        np.testing.assert_array_equal(delta, -0.5 * deltas(adapter)[path])


def test_concatenation_sums_deltas_over_the_union_of_modules() -> None:
    first, second = random_adapter(0, rank=3), random_adapter(1, rank=5, targets=("to_q", "conv1"))
    joined = adapters.concatenate([adapters.scaled(first, 0.7), adapters.scaled(second, -0.3)])
    assert joined.keys() == first.keys()
    assert joined[LINEAR]["scale"].shape == (8,)
    assert joined["down_blocks.0.attentions.0.proj_in"]["scale"].shape == (3,)
    ours, a, b = deltas(joined), deltas(first), deltas(second)
    for path in joined:
        expected = np.float32(0.7) * a[path] + (np.float32(-0.3) * b[path] if path in b else 0)
        np.testing.assert_allclose(ours[path], expected, rtol=1e-5, atol=1e-5)
    assert adapters.concatenate([]) == {}


def test_padding_reaches_one_common_bucket_and_keeps_the_delta() -> None:
    adapter = {**random_adapter(0, rank=3), **random_adapter(1, rank=9, targets=("to_q",))}
    padded = adapters.pad(adapter)
    assert {entry["scale"].shape for entry in padded.values()} == {(16,)}
    assert padded[CONV]["down"].shape == (3, 3, 8, 16)
    before, after = deltas(adapter), deltas(padded)
    for path in adapter:
        np.testing.assert_allclose(after[path], before[path], rtol=1e-6, atol=1e-6)
    assert adapters.pad({}) == {}


def test_buckets_double_without_end() -> None:
    assert [adapters.bucket(rank) for rank in (1, 8, 9, 64, 65, 1024, 1025, 3000)] == [
        *(8, 8, 16, 64, 128, 1024, 2048, 4096)
    ]
    assert adapters.bucket(7, (4, 6)) == 12


def test_numpy_adapters_stay_numpy_and_agree_with_jax() -> None:
    host = jax.device_get(random_adapter(0, rank=3))

    def combined(adapter: adapters.Adapter) -> adapters.Adapter:
        return adapters.pad(adapters.concatenate([adapters.scaled(adapter, 0.3), adapter]))

    on_host, on_device = combined(host), combined(jax.device_put(host))
    assert all(type(leaf) is np.ndarray and leaf.dtype == np.float32 for leaf in jax.tree.leaves(on_host))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device))
    jax.tree.map(np.testing.assert_array_equal, on_host, on_device)


def test_split_and_join_are_inverse_and_the_factors_hold_no_scale() -> None:
    adapter = random_adapter(0, rank=3)
    factors, scales = adapters.split(adapter)
    assert all(pair.keys() == {"down", "up"} for pair in factors.values())
    assert scales.keys() == adapter.keys()
    joined = adapters.join(factors, scales)
    jax.tree.map(np.testing.assert_array_equal, joined, adapter)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_adds_in_float32_and_rounds_once(dtype: jnp.dtype) -> None:
    adapter = random_adapter(0, rank=3)
    params = random_params(dtype)
    merged = adapters.merge(params, adapter, scale=0.5)
    for path, before in params.items():
        module = path.removesuffix(".kernel")
        if module not in adapter:
            assert merged[path] is before
            continue
        expected = (np.asarray(before, np.float32) + np.float32(0.5) * deltas(adapter)[module]).astype(dtype)
        assert merged[path].dtype == dtype
        np.testing.assert_array_equal(np.asarray(merged[path]), expected)


def test_merging_an_unknown_module_names_it() -> None:
    with pytest.raises(KeyError, match=r"somewhere\.else"):
        adapters.merge({}, {"somewhere.else": random_adapter(0, rank=2)[LINEAR]})


@pytest.mark.parametrize(("family", "modules", "parameters"), [("sd15", 278, 67_252_224), ("sdxl", 788, 196_751_360)])
def test_the_14_targets_are_the_modules_of_the_published_loras(family: str, modules: int, parameters: int) -> None:
    shapes = adaptable_shapes({"unet": FAMILIES[family]["unet"]})["unet"]
    abstract = jax.eval_shape(lambda key: adapters.init(key, shapes, rank=64), jax.random.key(0))
    assert len(abstract) == modules
    assert sum(entry["down"].size + entry["up"].size for entry in abstract.values()) == parameters
