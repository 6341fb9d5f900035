"""The three model families whose shapes are known without a model: what their `config.json` files say.

And what a diffusers folder of each family states besides: single files state none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.models.clip_text import ClipTextConfig, clip_text
from hypersd_jax.models.unet import UNetConfig, unet

Shapes = dict[str, dict[str, jax.ShapeDtypeStruct]]

UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
}

_FOUR_LEVELS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}

CLIP = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "vocab_size": 49408,
}

_CLIP_L = {
    **CLIP,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}

FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {
            **UNET,
            **_FOUR_LEVELS,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "sample_size": 64,
        },
        "text_encoder": _CLIP_L,
    },
    "sd21": {
        "unet": {
            **UNET,
            **_FOUR_LEVELS,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "dual_cross_attention": False,
            "only_cross_attention": False,
            "sample_size": 96,
            "upcast_attention": True,
            "use_linear_projection": True,
        },
        "text_encoder": {
            **CLIP,
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "projection_dim": 512,
        },
    },
    "sdxl": {
        "unet": {
            **UNET,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
            "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
        },
        "text_encoder": _CLIP_L,
        "text_encoder_2": {
            **CLIP,
            "architectures": ["CLIPTextModelWithProjection"],
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 20,
            "num_hidden_layers": 32,
            "projection_dim": 1280,
        },
    },
}
"""``{family: {component: config}}``; SD 2.0 and 2.1 share `sd21`, in which only sample size and upcasting differ."""


VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "norm_num_groups": 32,
    "out_channels": 3,
}
"""The configuration that all autoencoders of Stable Diffusion share."""

SCALING_FACTORS = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
"""Scaling factors of the latents, by generation of models."""

NATIVE_SIZES = {"sd1": 512, "sd2": 768, "sdxl": 1024}
"""Side of the images in pixels; SD 2.x that predicts noise is made for 512."""

_SCHEDULE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd1": {"_class_name": "PNDMScheduler", **_SCHEDULE},
    "sd2": {"_class_name": "DDIMScheduler", **_SCHEDULE},
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        **_SCHEDULE,
        "interpolation_type": "linear",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
}
"""`scheduler_config.json` without `prediction_type`, as stable-diffusion-v1-5, -2-1 and -xl-base-1.0 have it."""


def model_index(scheduler: str, *, xl: bool, inpainting: bool) -> dict[str, Any]:
    """`model_index.json` of a pipeline with a scheduler of this class and without safety checker."""
    library = "diffusers"
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if xl else ''}{'Inpaint' if inpainting else ''}Pipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": [library, scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": [library, "UNet2DConditionModel"],
        "vae": [library, "AutoencoderKL"],
    }
    if xl:
        index["force_zeros_for_empty_prompt"] = True
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    else:
        index["requires_safety_checker"] = False
        index["safety_checker"] = [None, None]
    return index


def adaptable_shapes(configs: Mapping[str, Mapping[str, Any]]) -> Shapes:
    """The parameter shapes of the components that a LoRA can adapt; nothing is materialised.

    Args:
        configs: ``{"unet" | "text_encoder" | "text_encoder_2": config.json}``.
    """
    shapes = {}
    for component, config in configs.items():
        if component == "unet":
            network = unet(UNetConfig.from_dict(dict(config)), dtype=jnp.float32)
        else:
            projection = component == "text_encoder_2"
            network = clip_text(ClipTextConfig.from_dict(dict(config)), dtype=jnp.float32, projection=projection)
        shapes[component] = network.shapes
    return shapes
