"""ControlNets against diffusers' ControlNetModel: residuals, the steered UNet and all gradients, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

from hypersd_jax.models import (
    ControlNetConfig,
    UNetConfig,
    controlnet,
    residual_scales,
    sum_residuals,
    unet,
)
from hypersd_jax.weights.diffusers.controlnet import load_controlnet
from tests.helpers.quick import quick_jit
from tests.helpers.torch_weights import params_from_torch, perturb, relative_error

SMALL: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
XL: dict[str, Any] = {
    **SMALL,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "use_linear_projection": True,
    "attention_head_dim": [1, 2],
    "transformer_layers_per_block": [1, 2],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 46,
}
# What the configuration adds for the ControlNet alone.
CONTROL: dict[str, dict[str, Any]] = {
    "sd1": {"conditioning_embedding_out_channels": [4, 6, 8]},
    "sdxl": {"conditioning_embedding_out_channels": [4, 6], "controlnet_conditioning_channel_order": "bgr"},
    "pooled": {
        "conditioning_embedding_out_channels": [4],
        "conditioning_channels": 2,
        "global_pool_conditions": True,
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
    },
}
UNETS = {"sd1": SMALL, "sdxl": XL, "pooled": {**SMALL, "layers_per_block": 2, "mid_block_type": "UNetMidBlock2D"}}
SIZES = {"sd1": (9, 7), "sdxl": (5, 6), "pooled": (4, 8)}
TIMESTEPS = np.array([7, 981])


def steered_config(name: str) -> dict[str, Any]:
    """The UNet that is steered, whose own blocks are other tests': attention in its middle alone."""
    levels = len(UNETS[name]["down_block_types"])
    return {**UNETS[name], "down_block_types": ["DownBlock2D"] * levels, "up_block_types": ["UpBlock2D"] * levels}


def torch_control(name: str, seed: int = 1) -> ControlNetModel:
    torch.manual_seed(seed)
    return perturb(fill(ControlNetModel(**{**UNETS[name], **CONTROL[name]})), seed)


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Randomise the convolutions that start at zero, so that residuals are of the features' size."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 4 and not parameter.any():
                parameter.normal_(0, (parameter.shape[1] * parameter.shape[2] * parameter.shape[3]) ** -0.5)
    return module


def inputs(name: str) -> dict[str, Any]:
    random, (h, w) = np.random.default_rng(len(name)), SIZES[name]
    factor = 2 ** (len(CONTROL[name]["conditioning_embedding_out_channels"]) - 1)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    image = random.random((2, factor * h, factor * w, CONTROL[name].get("conditioning_channels", 3)), np.float32)
    found = {"sample": normal(2, h, w, 4), "context": normal(2, 3, 12), "image": image}
    if name == "sdxl":
        found |= {"pooled": normal(2, 10), "time_ids": random.integers(0, 1024, (2, 6)).astype(np.float32)}
    return found


def nchw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 3, 1, 2)


def torch_run(control: Any, steered: Any, given: dict[str, torch.Tensor], scale: Any, **more: Any) -> Any:
    """Residuals and the UNet's output, as diffusers' pipelines compute them."""
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]} if "pooled" in given else None
    sample, context, image = nchw(given["sample"]), given["context"], nchw(given["image"])
    times = torch.tensor(TIMESTEPS)
    many = isinstance(control, MultiControlNetModel)
    down, mid = control(
        sample,
        times,
        context,
        [image] * len(scale) if many else image,
        scale,
        added_cond_kwargs=added,
        return_dict=False,
        **more,
    )
    output = steered(
        sample,
        times,
        context,
        added_cond_kwargs=added,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample
    return [*(level.permute(0, 2, 3, 1) for level in (*down, mid)), output.permute(0, 2, 3, 1)]


@pytest.mark.parametrize("name", CONTROL)
def test_values_and_gradients(name: str) -> None:
    theirs = torch_control(name)
    torch.manual_seed(2)
    config = steered_config(name)
    their_unet = perturb(UNet2DConditionModel(**config), seed=2).requires_grad_(False)
    control_config = ControlNetConfig.from_dict({**UNETS[name], **CONTROL[name]})
    network, steered = controlnet(control_config), unet(UNetConfig.from_dict(config))
    params, unet_params = params_from_torch(theirs, network.shapes), params_from_torch(their_unet, steered.shapes)
    given, scale = inputs(name), 0.8
    scales = residual_scales(control_config, scale)

    def run(params: Any, given: Any) -> list[jax.Array]:
        added = {key: given[key] for key in ("pooled", "time_ids") if key in given}
        seen = (given["sample"], TIMESTEPS, given["context"])
        down, mid = network(params, *seen, given["image"], scales, **added)
        return [*down, mid, steered(unet_params, *seen, **added, down_residuals=down, mid_residual=mid)]

    tensors = {key: torch.tensor(array, requires_grad=True) for key, array in given.items()}
    wanted = torch_run(theirs, their_unet, tensors, scale)
    random = np.random.default_rng(9)
    cotangents = [random.standard_normal(tuple(value.shape)).astype(np.float32) for value in wanted]
    sum((value * torch.tensor(cotangent)).sum() for value, cotangent in zip(wanted, cotangents, strict=True)).backward()

    @quick_jit
    def ours(params: Any, given: Any) -> Any:
        values, back = jax.vjp(run, params, given)
        return values, back(cotangents)

    values, (params_grad, given_grad) = ours(params, given)
    assert len(values) == len(wanted) == len(control_config.skip_channels) + 2
    for i, (value, reference) in enumerate(zip(values, wanted, strict=True)):
        assert relative_error(value, reference) < 1e-5, i
    for key in ("sample", "context", "image", *(["pooled"] if "pooled" in given else [])):
        assert relative_error(given_grad[key], tensors[key].grad) < 1e-4, key
    grads = params_from_torch(theirs, network.shapes, grads=True)
    total = np.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in grads.values()))
    for path, gradient in grads.items():
        # A leaf whose gradient is nearly nothing (a bias before a norm) is held against the whole.
        limit = max(float(np.linalg.norm(gradient)), 1e-3 * total)
        assert float(np.linalg.norm(params_grad[path] - gradient)) < 1e-4 * limit, path


@pytest.mark.parametrize("name", ["sd1", "pooled"])
def test_guess_mode(name: str) -> None:
    theirs = torch_control(name)
    config = ControlNetConfig.from_dict({**UNETS[name], **CONTROL[name]})
    network, given = controlnet(config), inputs(name)
    params = params_from_torch(theirs, network.shapes)
    down, mid = quick_jit(network)(
        params, given["sample"], TIMESTEPS, given["context"], given["image"], residual_scales(config, 0.7, guess=True)
    )
    with torch.no_grad():
        tensors = {key: torch.tensor(array) for key, array in given.items()}
        their_down, their_mid = theirs(
            nchw(tensors["sample"]),
            torch.tensor(TIMESTEPS),
            tensors["context"],
            nchw(tensors["image"]),
            0.7,
            guess_mode=True,
            return_dict=False,
        )
    for value, reference in zip((*down, mid), (*their_down, their_mid), strict=True):
        assert relative_error(value, reference.permute(0, 2, 3, 1)) < 1e-5


def test_two_networks_add_up(tmp_path: Path) -> None:
    """Both are written by diffusers and read from their folders, as users have them."""
    name, weights = "sd1", (0.5, 1.25)
    both = [torch_control(name, seed) for seed in (1, 5)]
    torch.manual_seed(2)
    config = steered_config(name)
    their_unet = perturb(UNet2DConditionModel(**config), seed=2)
    unet_config = UNetConfig.from_dict(config)
    steered, given = unet(unet_config), inputs(name)
    unet_params = params_from_torch(their_unet, steered.shapes)
    loaded = []
    for i, control in enumerate(both):
        control.save_pretrained(tmp_path / str(i))
        loaded.append(load_controlnet(tmp_path / str(i), unet_config=unet_config, downscale=4, dtype=jnp.float32))
        assert loaded[i].config.downscale == 4

    @quick_jit
    def ours(params: Any) -> list[jax.Array]:
        seen = (given["sample"], TIMESTEPS, given["context"])
        residuals = [
            control.network(own, *seen, given["image"], residual_scales(control.config, weight))
            for control, own, weight in zip(loaded, params, weights, strict=True)
        ]
        down, mid = sum_residuals(residuals)
        return [*down, mid, steered(unet_params, *seen, down_residuals=down, mid_residual=mid)]

    values = ours([control.params for control in loaded])
    with torch.no_grad():
        tensors = {key: torch.tensor(array) for key, array in given.items()}
        wanted = torch_run(MultiControlNetModel(both), their_unet, tensors, list(weights))
    for value, reference in zip(values, wanted, strict=True):
        assert relative_error(value, reference) < 1e-5


def test_full_size_configurations_have_diffusers_parameters() -> None:
    """SD 1.5's and SDXL's ControlNets at full size: names and shapes only, on torch's meta device."""
    sdxl = {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    for config in ({"cross_attention_dim": 768}, sdxl):
        with torch.device("meta"):
            theirs = dict(ControlNetModel(**config).named_parameters())
        shapes = controlnet(ControlNetConfig.from_dict(config)).shapes
        count = sum(parameter.numel() for parameter in theirs.values())
        assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == count
        assert {path.rsplit(".", 1)[0] for path in shapes} == {name.rsplit(".", 1)[0] for name in theirs}
