"""Single-file checkpoints for tests: what a file holds, and variants of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hypersd_jax.weights import families
from hypersd_jax.weights.assembly import Description, networks, parse
from hypersd_jax.weights.single_file import keys, write_single_file
from hypersd_jax.weights.single_file.configs import Generation
from hypersd_jax.weights.single_file.header import pad_token
from hypersd_jax.weights.tensors import open_tensors, save_tensors
from hypersd_jax.weights.tokenizers import clip_tokenizer

Tensors = dict[str, np.ndarray]


def read_all(path: Path) -> Tensors:
    """Every tensor of a file by key."""
    with open_tensors(path) as file:
        return {key: file.read(key) for key in file.keys()}  # noqa: SIM118 - not a mapping


def rewritten(
    path: Path,
    to: Path,
    change: Callable[[Tensors], Mapping[str, np.ndarray]] = lambda tensors: tensors,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A copy with other tensors; `metadata` in place of the file's own, where given."""
    with open_tensors(path) as file:
        own = file.metadata
    save_tensors(to, change(read_all(path)), own if metadata is None else metadata)
    return to


def passengers() -> Tensors:
    """Keys of real files that no network reads."""
    f32 = np.zeros(3, np.float32)
    return {
        "model_ema.decay": f32,
        "model_ema.diffusion_modeltime_embed0weight": f32,
        "betas": f32,
        "alphas_cumprod": f32,
        "alphas_cumprod_prev": f32,
        "sqrt_alphas_cumprod": f32,
        "sqrt_one_minus_alphas_cumprod": f32,
        "log_one_minus_alphas_cumprod": f32,
        "sqrt_recip_alphas_cumprod": f32,
        "sqrt_recipm1_alphas_cumprod": f32,
        "posterior_variance": f32,
        "posterior_mean_coef1": f32,
        "logvar": f32,
        "denoiser.sigmas": f32,
        "first_stage_model.loss.logvar": f32,
        "first_stage_model.loss.discriminator.main.0.weight": f32,
        "cond_stage_model.logit_scale": f32,
        f"{keys.CLIP}text_model.embeddings.position_ids": np.arange(3)[None],
        f"{keys.CLIP_XL}text_model.embeddings.position_ids": np.arange(3)[None],
        f"{keys.OPEN_CLIP_XL}logit_scale": f32,
        "global_step": np.asarray(7),
    }


def plain_model(kind: Generation) -> dict[str, dict[str, Any]]:
    """Configurations whose every key a file's shapes show: heads, groups and vocabulary are the families' own."""
    xl = kind == "sdxl"
    unet: dict[str, Any] = {
        **families.UNET,
        "attention_head_dim": 8 if kind == "sd1" else [1, 2],
        "block_out_channels": [64, 128],
        "cross_attention_dim": 128 if xl else 64,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"] if xl else ["CrossAttnDownBlock2D", "DownBlock2D"],
        "layers_per_block": 1,
        "sample_size": {"sd1": 256, "sd2": 384, "sdxl": 512}[kind],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"] if xl else ["UpBlock2D", "CrossAttnUpBlock2D"],
        "use_linear_projection": kind != "sd1",
    }
    if xl:
        unet |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
            "transformer_layers_per_block": [1, 2],
        }
    text: dict[str, Any] = {
        **families.CLIP,
        "hidden_act": "gelu" if kind == "sd2" else "quick_gelu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 16,
        "num_attention_heads": 1,
        "num_hidden_layers": 2,
        "projection_dim": 512 if kind == "sd2" else 64,
    }
    vae = {
        **families.VAE,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "scaling_factor": families.SCALING_FACTORS[kind],
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    configs = {"unet": unet, "vae": vae, "text_encoder": text}
    return {**configs, "text_encoder_2": {**text, "hidden_act": "gelu", "projection_dim": 16}} if xl else configs


def plain_file(path: Path, kind: Generation, *, header: bool = False) -> dict[str, dict[str, Any]]:
    """Write a random `plain_model`, without `header` as another program would; returns its parameters."""
    configs = plain_model(kind)
    roles = ["tokenizer", "tokenizer_2"] if kind == "sdxl" else ["tokenizer"]
    description = Description(
        origin=path,
        configs=configs,
        scheduler_config=families.SCHEDULERS[kind],
        model_index=families.model_index("DDIMScheduler", xl=kind == "sdxl", inpainting=False),
        tokenizers={role: clip_tokenizer(pad_token(kind, role), 16) for role in roles},
    )
    structure = parse(description)
    parts = networks(structure, dict.fromkeys(structure.components, jnp.float32))
    params = {name: part.init(0) for name, part in parts.items()}
    write_single_file(description, path, params.__getitem__)
    if not header:
        rewritten(path, path, metadata={})
    return params
