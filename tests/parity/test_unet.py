"""The UNet against diffusers' UNet2DConditionModel: values and all gradients, in float32."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import UNet2DConditionModel

from hypersd_jax.models import UNetConfig, unet
from tests.helpers.quick import quick_jit
from tests.helpers.torch_weights import params_from_torch, perturb, relative_error

SMALL: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
COARSE: dict[str, Any] = {
    **SMALL,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
PLAIN: dict[str, Any] = {**SMALL, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
# Together they have every kind of block, and each by itself few, as compiling them is what takes time.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {**SMALL, "mid_block_type": None, "attention_head_dim": 8},
    "sd2": {
        **SMALL,
        "mid_block_type": None,
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        **COARSE,
        "use_linear_projection": True,
        "attention_head_dim": [1, 2],
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 46,
    },
    "guidance_embedding": {
        **COARSE,
        "mid_block_type": None,
        "time_cond_proj_dim": 10,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "timestep_post_act": "silu",
        "time_embedding_act_fn": "gelu",
        "time_embedding_dim": 40,
        "center_input_sample": True,
    },
    "odd_size": {**PLAIN, "mid_block_type": "UNetMidBlock2D", "in_channels": 5, "out_channels": 3},
    "layers_list": {**COARSE, "layers_per_block": [2, 1], "mid_block_type": None, "conv_in_kernel": 5},
    "asymmetric": {
        **COARSE,
        "transformer_layers_per_block": [1, [1]],
        "reverse_transformer_layers_per_block": [[2, 1], 1],
        "cross_attention_dim": [12, 12],
        "only_cross_attention": [False, True],
        "downsample_padding": 0,
        "mid_block_type": None,
    },
    "no_middle": {
        **SMALL,
        "mid_block_type": None,
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "mish",
        "norm_eps": 1e-3,
        "conv_out_kernel": 1,
    },
    "middle_scale": {**PLAIN, "mid_block_scale_factor": 1.5, "act_fn": "relu"},
}
SIZES = {"odd_size": (9, 7)}


def inputs(name: str) -> tuple[dict[str, Any], np.ndarray]:
    """Generate the inputs that the config asks for, and a cotangent for the output."""
    config, random = CONFIGS[name], np.random.default_rng(len(name))
    h, w = SIZES.get(name, (4, 8))

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    found: dict[str, Any] = {"sample": normal(2, h, w, config.get("in_channels", 4)), "context": normal(2, 3, 12)}
    if "addition_embed_type" in config:
        found["pooled"] = normal(2, 10)
        found["time_ids"] = random.integers(0, 1024, (2, 6)).astype(np.float32)
    if "time_cond_proj_dim" in config:
        found["timestep_cond"] = normal(2, 10)
    return found, normal(2, h, w, config.get("out_channels", 4))


TIMESTEPS = np.array([7, 981])


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients(name: str) -> None:
    config = CONFIGS[name]
    torch.manual_seed(0)
    theirs = perturb(UNet2DConditionModel(**config), seed=1)
    network = unet(UNetConfig.from_dict(config))
    params = params_from_torch(theirs, network.shapes)
    given, cotangent = inputs(name)

    @quick_jit
    def ours(params: Any, given: Any) -> Any:
        def run(params: Any, given: Any) -> jax.Array:
            rest = {key: value for key, value in given.items() if key not in ("sample", "context")}
            return network(params, given["sample"], TIMESTEPS, given["context"], **rest)

        value, back = jax.vjp(run, params, given)
        return value, back(cotangent)

    value, (params_grad, given_grad) = ours(params, given)

    tensors = {key: torch.tensor(array, requires_grad=True) for key, array in given.items()}
    added = {"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]} if "pooled" in given else None
    output = theirs(
        tensors["sample"].permute(0, 3, 1, 2),
        torch.tensor(TIMESTEPS),
        tensors["context"],
        timestep_cond=tensors.get("timestep_cond"),
        added_cond_kwargs=added,
    ).sample.permute(0, 2, 3, 1)
    (output * torch.tensor(cotangent)).sum().backward()

    assert relative_error(value, output) < 1e-5
    for key in given:
        if key != "time_ids" and tensors[key].grad is not None:
            assert relative_error(given_grad[key], tensors[key].grad) < 1e-4, key
    wanted = params_from_torch(theirs, network.shapes, grads=True)
    total = np.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in wanted.values()))
    for path, gradient in wanted.items():
        # A leaf whose gradient is nearly nothing (a bias before a norm) is held against the whole.
        scale = max(float(np.linalg.norm(gradient)), 1e-3 * total)
        assert float(np.linalg.norm(params_grad[path] - gradient)) < 1e-4 * scale, path


def test_full_size_configurations_have_diffusers_parameters() -> None:
    """SD 1.5, SD 2.1 and SDXL at full size: names and shapes only, on torch's meta device."""
    sd15 = {"cross_attention_dim": 768}
    sd21 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    sdxl = {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    for config in (sd15, sd21, sdxl):
        with torch.device("meta"):
            theirs = dict(UNet2DConditionModel(**config).named_parameters())
        shapes = unet(UNetConfig.from_dict(config)).shapes
        count = sum(parameter.numel() for parameter in theirs.values())
        assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == count
        names = {path.rsplit(".", 1)[0] for path in shapes}
        assert names == {name.rsplit(".", 1)[0] for name in theirs}
