"""Tiny random Stable Diffusion pipelines, written by diffusers in its own layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hypersd_jax.weights.components import assets
from tests.helpers.torch_weights import perturb

WIDTH = 32
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def _text_config(tokenizer: CLIPTokenizer, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def _unet(cross: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=cross,
        **more,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=0.2,
    )


def _blocks(attentive: str | None) -> dict[str, Any]:
    """Two levels with attention in one of them, "first" or "last", or in the middle alone, which compiles faster."""
    kinds = [("CrossAttn" if place == attentive else "") for place in ("first", "last")]
    return {
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
    }


def tiny_sd(
    folder: Path,
    prediction_type: str = "epsilon",
    guidance_embedding: int | None = None,
    *,
    in_channels: int = 4,
    attentive: bool = False,
) -> Path:
    """An SD-1.x-shaped (epsilon) or SD-2.x-shaped (v_prediction) pipeline of 16 px images.

    With a ``guidance_embedding`` dimension the UNet reads the guidance scale, as LCM's do; with 9 ``in_channels`` it is
    an inpainting model. An ``attentive`` one has attention in the blocks down and up too.
    """
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(str(assets() / "teacher" / "tokenizer"))
    second = prediction_type == "v_prediction"
    unet = _unet(
        WIDTH,
        in_channels=in_channels,
        **_blocks("first" if attentive else None),
        attention_head_dim=[2, 4] if second else 4,
        use_linear_projection=second,
        time_cond_proj_dim=guidance_embedding,
    )
    text = CLIPTextModel(_text_config(tokenizer, hidden_act="gelu" if second else "quick_gelu"))
    pipe = StableDiffusionPipeline(
        vae=perturb(_vae(), 1, 0.05),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=perturb(unet, 2, 0.05),
        scheduler=DDIMScheduler(**SCHEDULER, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def tiny_sdxl(folder: Path, *, in_channels: int = 4, attentive: bool = False) -> Path:
    """An SDXL-shaped pipeline of 16 px images: two text encoders, text_time, transformer layers per block.

    With 9 ``in_channels`` it is an inpainting model. An ``attentive`` one has attention in the blocks down and up too.
    """
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(str(assets() / "teacher" / "tokenizer"))
    text_2 = CLIPTextModelWithProjection(_text_config(tokenizer, hidden_act="gelu", projection_dim=16))
    unet = _unet(
        2 * WIDTH,
        in_channels=in_channels,
        **_blocks("last" if attentive else None),
        attention_head_dim=[2, 4],
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    pipe = StableDiffusionXLPipeline(
        vae=perturb(_vae(), 1, 0.05),
        text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_act="quick_gelu")),
        text_encoder_2=text_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=perturb(unet, 2, 0.05),
        scheduler=DDIMScheduler(**SCHEDULER),
        force_zeros_for_empty_prompt=True,
    )
    pipe.save_pretrained(folder)
    return folder


def copied(folder: Path, to: Path) -> Path:
    """A copy of a pipeline's folder, to be damaged."""
    shutil.copytree(folder, to)
    return to
