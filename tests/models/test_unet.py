"""How the UNet runs: data types, rematerialisation, taps, adapters, sharding and NNX's tree mode."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hypersd_jax.adapters import merge, target_paths
from hypersd_jax.models import UNetConfig, unet
from tests.helpers.quick import quick_jit

CONFIG = UNetConfig.from_dict(
    {
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "mid_block_type": None,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
    }
)
NETWORK = unet(CONFIG)
# One level, with attention in one of its blocks: its gradient compiles in a fraction of the time.
ONE_LEVEL = UNetConfig.from_dict(
    {
        "block_out_channels": [16],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "mid_block_type": None,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
    }
)
RANDOM = np.random.default_rng(0)
SAMPLE = RANDOM.standard_normal((2, 8, 8, 4)).astype(np.float32)
CONTEXT = RANDOM.standard_normal((2, 3, 12)).astype(np.float32)
TIMES = np.array([10, 990])


def relative(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return NETWORK.init(0)


@pytest.fixture(scope="module")
def expected(params: dict[str, jax.Array]) -> np.ndarray:
    return np.asarray(quick_jit(NETWORK)(params, SAMPLE, TIMES, CONTEXT))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_near_float32(dtype: Any, params: dict[str, jax.Array], expected: np.ndarray) -> None:
    network = unet(CONFIG, dtype=dtype)
    assert {leaf.dtype for leaf in network.shapes.values()} == {jnp.dtype(dtype)}
    half = {path: leaf.astype(dtype) for path, leaf in params.items()}
    out = quick_jit(network)(half, SAMPLE, TIMES, CONTEXT)
    assert out.dtype == dtype
    assert relative(out, expected) < 3e-2


def test_remat_changes_neither_values_nor_gradients() -> None:
    params = unet(ONE_LEVEL).init(0)

    def loss(network: Any) -> Any:
        return quick_jit(
            jax.value_and_grad(lambda p, x: jnp.sum(jnp.square(network(p, x, TIMES, CONTEXT))), argnums=(0, 1))
        )

    value, (grads, dx) = loss(unet(ONE_LEVEL))(params, SAMPLE)
    again, (regrads, redx) = loss(unet(ONE_LEVEL, remat=True))(params, SAMPLE)
    assert relative(again, value) < 1e-6
    assert relative(redx, dx) < 1e-5
    for path, gradient in grads.items():
        scale = max(float(np.linalg.norm(gradient)), 1e-2)
        assert float(np.linalg.norm(np.asarray(regrads[path]) - gradient)) < 1e-5 * scale, path


def test_remat_recomputes(params: dict[str, jax.Array]) -> None:
    def dots(network: Any) -> int:
        text = str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(network(p, SAMPLE, TIMES, CONTEXT))))(params))
        return text.count("conv_general_dilated[")

    assert dots(unet(CONFIG, remat=True)) > dots(NETWORK)


def test_taps_return_block_outputs(params: dict[str, jax.Array], expected: np.ndarray) -> None:
    taps = ("down_blocks.0", "down_blocks.1", "up_blocks.1")
    out, features = quick_jit(lambda p: NETWORK(p, SAMPLE, TIMES, CONTEXT, taps=taps))(params)
    assert relative(out, expected) < 1e-6
    assert {name: feature.shape for name, feature in features.items()} == {
        "down_blocks.0": (2, 4, 4, 16),
        "down_blocks.1": (2, 4, 4, 32),
        "up_blocks.1": (2, 8, 8, 16),
    }
    with pytest.raises(ValueError, match="mid_block"):
        jax.eval_shape(lambda p: NETWORK(p, SAMPLE, TIMES, CONTEXT, taps=("mid_block",)), NETWORK.shapes)


@pytest.mark.parametrize("remat", [False, True])
def test_an_adapter_equals_merged_weights(params: dict[str, jax.Array], remat: bool) -> None:
    random = np.random.default_rng(1)
    adapter: dict[str, Any] = {}
    for path in target_paths(NETWORK.shapes):
        *down, out = NETWORK.shapes[f"{path}.kernel"].shape
        adapter[path] = {
            "down": random.standard_normal((*down, 2)).astype(np.float32),
            "up": 0.1 * random.standard_normal((2, out)).astype(np.float32),
            "scale": np.array([0.5, 1.5], np.float32),
        }
    network = unet(CONFIG, remat=remat)
    run = quick_jit(lambda p, a: network(p, SAMPLE, TIMES, CONTEXT, adapter=a))
    attached, merged = run(params, adapter), run(merge(params, adapter), None)
    assert relative(attached, run(params, None)) > 1e-2
    assert relative(attached, merged) < 1e-5


def test_batch_sharding_constrains_and_keeps_values(params: dict[str, jax.Array], expected: np.ndarray) -> None:
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    network = unet(CONFIG, batch_sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    text = str(jax.make_jaxpr(network)(params, SAMPLE, TIMES, CONTEXT))
    assert text.count("sharding_constraint") > 8
    assert relative(quick_jit(network)(params, SAMPLE, TIMES, CONTEXT), expected) < 1e-6


def test_missing_inputs_are_named() -> None:
    xl = unet(
        UNetConfig.from_dict(
            {
                "block_out_channels": [8],
                "down_block_types": ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"],
                "mid_block_type": None,
                "norm_num_groups": 4,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 30,
            }
        )
    )
    with pytest.raises(ValueError, match="pooled and time_ids"):
        jax.eval_shape(lambda p: xl(p, SAMPLE, TIMES, CONTEXT), xl.shapes)
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        jax.eval_shape(lambda p: NETWORK(p, SAMPLE, TIMES, CONTEXT, timestep_cond=SAMPLE[:, 0, 0]), NETWORK.shapes)


TREE_MODE = """
import numpy as np
from tests.helpers.quick import quick_jit
from tests.models.test_unet import CONTEXT, NETWORK, SAMPLE, TIMES
adapter = {"conv_in": {"down": np.ones((3, 3, 4, 2)), "up": np.zeros((2, 16)), "scale": np.ones(2)}}
out = quick_jit(NETWORK)(NETWORK.init(0), SAMPLE, TIMES, CONTEXT, adapter=adapter)
assert np.isfinite(np.asarray(out)).all()
np.save(__import__("sys").argv[1], out)
"""


def test_nnx_tree_mode_gives_the_same(expected: np.ndarray, tmp_path: Any) -> None:
    """A process of its own: NNX reads the mode when it is imported. The adapter's `up` is zero, so values agree."""
    environment = {**os.environ, "NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false", "JAX_PLATFORMS": "cpu"}
    target = tmp_path / "out.npy"
    subprocess.run([sys.executable, "-c", TREE_MODE, str(target)], check=True, env=environment, timeout=300)
    assert relative(np.load(target), expected) < 1e-5
