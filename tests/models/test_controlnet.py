"""ControlNets: what their configurations may hold, what they fit, and how they run."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from hypersd_jax.errors import UserError
from hypersd_jax.models import (
    ControlNetConfig,
    UNetConfig,
    control_residuals,
    controlnet,
    residual_scales,
    sum_residuals,
    unet,
)
from hypersd_jax.weights.diffusers.component import save_params
from hypersd_jax.weights.diffusers.controlnet import load_controlnet
from tests.helpers.quick import quick_jit

UNET: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
CONTROL: dict[str, Any] = {
    **UNET,
    "_class_name": "ControlNetModel",
    "conditioning_embedding_out_channels": [4, 6],
    "num_class_embeds": None,
}
UNET_CONFIG = UNetConfig.from_dict({**UNET, "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]})
CONFIG = ControlNetConfig.from_dict(CONTROL)
NETWORK = controlnet(CONFIG)
STEERED = unet(UNET_CONFIG)
RANDOM = np.random.default_rng(0)
SAMPLE = RANDOM.standard_normal((2, 5, 4, 4)).astype(np.float32)
CONTEXT = RANDOM.standard_normal((2, 3, 12)).astype(np.float32)
IMAGE = RANDOM.random((2, 10, 8, 3), np.float32)
TIMES = np.array([10, 990])


def relative(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@functools.cache
def steer(network: Any, steered: Any) -> Any:
    """The UNet's output with what the ControlNet adds."""

    def run(params: Any, unet_params: Any, scales: Any) -> jax.Array:
        down, mid = network(params, SAMPLE, TIMES, CONTEXT, IMAGE, scales)
        return steered(unet_params, SAMPLE, TIMES, CONTEXT, down_residuals=down, mid_residual=mid)

    return quick_jit(run)


@pytest.fixture(scope="module")
def params() -> Any:
    return NETWORK.init(0), STEERED.init(1)


def test_scale_0_leaves_the_unet_alone(params: Any) -> None:
    run = steer(NETWORK, STEERED)
    alone = quick_jit(STEERED)(params[1], SAMPLE, TIMES, CONTEXT)
    assert relative(run(*params, residual_scales(CONFIG, 0.0)), alone) < 1e-6
    assert relative(run(*params, residual_scales(CONFIG, 1.0)), alone) > 1e-2


def test_half_precision_is_near_float32(params: Any) -> None:
    expected = steer(NETWORK, STEERED)(*params, residual_scales(CONFIG, 1.0))
    half = [{path: leaf.astype(jnp.bfloat16) for path, leaf in tree.items()} for tree in params]
    networks = controlnet(CONFIG, dtype=jnp.bfloat16), unet(UNET_CONFIG, dtype=jnp.bfloat16)
    rough = steer(*networks)(*half, residual_scales(CONFIG, 1.0))
    assert rough.dtype == jnp.bfloat16
    assert relative(rough, expected) < 3e-2


def test_scales() -> None:
    assert CONFIG.skip_channels == (8, 8, 8, 16)
    np.testing.assert_array_equal(residual_scales(CONFIG, 0.5), np.full(5, 0.5, np.float32))
    rising = residual_scales(CONFIG, 2.0, guess=True)
    assert rising.dtype == np.float32
    np.testing.assert_allclose(rising, [0.2, 0.2 * 10**0.25, 0.2 * 10**0.5, 0.2 * 10**0.75, 2.0], rtol=1e-6)


def test_sums() -> None:
    one, two = ((jnp.ones(2), jnp.ones(3)), jnp.ones(1)), ((jnp.full(2, 2.0), jnp.zeros(3)), jnp.full(1, 3.0))
    down, mid = sum_residuals([one, two, two])
    assert [level.tolist() for level in down] == [[5.0, 5.0], [1.0, 1.0, 1.0]]
    assert mid.tolist() == [7.0]
    assert sum_residuals([one]) == one


@pytest.mark.parametrize("prompted_only", [False, True])
def test_guided_batches(params: Any, prompted_only: bool) -> None:
    """Two networks on a batch whose first half has no prompt; the images are given once."""
    own = [params[0], NETWORK.init(2)]
    scales = [residual_scales(CONFIG, 0.5), residual_scales(CONFIG, 2.0, guess=True)]
    doubled = [np.concatenate([value, -value]) for value in (SAMPLE, TIMES, CONTEXT)]

    @quick_jit
    def together(own: Any) -> Any:
        images = [IMAGE, IMAGE[::-1]]
        return control_residuals([NETWORK] * 2, own, images, scales, *doubled, prompted_only=prompted_only)

    @quick_jit
    def apart(own: Any) -> Any:
        one, two = (
            NETWORK(p, *doubled, np.concatenate([image, image]), scale)
            for p, image, scale in zip(own, (IMAGE, IMAGE[::-1]), scales, strict=True)
        )
        return jax.tree.map(jnp.add, one, two)

    found, wanted = jax.tree.leaves(together(own)), jax.tree.leaves(apart(own))
    assert len(found) == len(wanted) == 5
    for ours, reference in zip(found, wanted, strict=True):
        assert relative(ours[2:], reference[2:]) < 1e-5
        if prompted_only:
            assert not ours[:2].any()
        else:
            assert relative(ours[:2], reference[:2]) < 1e-5


def test_wrong_inputs_are_named() -> None:
    scales = residual_scales(CONFIG, 1.0)
    with pytest.raises(ValueError, match=r"image is \(10, 10\), but these latents need \(10, 8\)"):
        jax.eval_shape(lambda p: NETWORK(p, SAMPLE, TIMES, CONTEXT, np.zeros((2, 10, 10, 3)), scales), NETWORK.shapes)
    with pytest.raises(ValueError, match="3 down_residuals for 4 skips"):
        jax.eval_shape(
            lambda p: STEERED(p, SAMPLE, TIMES, CONTEXT, down_residuals=(SAMPLE,) * 3, mid_residual=SAMPLE),
            STEERED.shapes,
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported"),
        ({"num_class_embeds": 6}, "num_class_embeds=6 is not supported"),
        ({"controlnet_conditioning_channel_order": "rbg"}, "controlnet_conditioning_channel_order='rbg'"),
        ({"conditioning_embedding_out_channels": []}, r"conditioning_embedding_out_channels=\[\] is not a list"),
        ({"conditioning_embedding_out_channels": [4, "6"]}, "conditioning_embedding_out_channels"),
        ({"conditioning_channels": 0}, "conditioning_channels=0 is not a positive"),
        ({"mid_block_type": None}, "mid_block_type=None"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "down_block_types 'AttnDownBlock2D'"),
        ({"global_pool_conditions": 1}, "global_pool_conditions=1"),
        ({"encoder_hid_dim": 8}, "encoder_hid_dim=8"),
        ({"_class_name": "ControlNetUnionModel"}, "expected ControlNetModel, found 'ControlNetUnionModel'"),
        ({"up_block_types": ["UpBlock2D"] * 2}, "unknown key up_block_types"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        ControlNetConfig.from_dict({**CONTROL, **change})
    assert "UNet2DConditionModel" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_out_channels": [8, 32]}, r"block_out_channels makes \[8, 32\], but the model has \[8, 16\]"),
        ({"layers_per_block": 2}, r"layers_per_block makes \[2, 2\], but the model has \[1, 1\]"),
        ({"cross_attention_dim": 16}, "cross_attention_dim"),
        ({"in_channels": 9}, "in_channels makes 9, but the model has 4"),
        ({"conditioning_embedding_out_channels": [4]}, "conditioning_embedding_out_channels makes 1, but the .* 2"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 2,
                "projection_class_embeddings_input_dim": 20,
            },
            "projection_class_embeddings_input_dim makes 8, but the model has 0",
        ),
    ],
)
def test_a_network_for_another_model_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONTROL, **change}))
    with pytest.raises(UserError, match=reason) as caught:
        load_controlnet(tmp_path, unet_config=UNET_CONFIG, downscale=2, dtype=jnp.float32)
    assert str(caught.value).startswith(f"{tmp_path}: ControlNetModel config: ")


def test_a_folder_is_read_onto_a_mesh(tmp_path: Path, params: Any) -> None:
    save_params(tmp_path, params[0], config=CONTROL, component_kind="unet")
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    loaded = load_controlnet(tmp_path, unet_config=UNET_CONFIG, downscale=2, dtype=jnp.float32, mesh=mesh)
    for path, leaf in params[0].items():
        assert loaded.params[path].sharding.mesh == mesh
        np.testing.assert_array_equal(loaded.params[path], leaf, err_msg=path)
    out = steer(loaded.network, STEERED)(loaded.params, params[1], residual_scales(loaded.config, 1.0))
    assert relative(out, steer(NETWORK, STEERED)(*params, residual_scales(CONFIG, 1.0))) < 1e-6


def test_damaged_weights_are_one_line(tmp_path: Path, params: Any) -> None:
    broken = {path: leaf for path, leaf in params[0].items() if path != "controlnet_mid_block.bias"}
    save_params(tmp_path, broken, config=CONTROL, component_kind="unet")
    with pytest.raises(UserError, match=r"1 missing \(controlnet_mid_block\.bias\)"):
        load_controlnet(tmp_path, unet_config=UNET_CONFIG, downscale=2, dtype=jnp.float32)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        load_controlnet("nowhere", unet_config=UNET_CONFIG, downscale=2, dtype=jnp.float32)
