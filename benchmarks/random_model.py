"""A full-size Stable Diffusion model with random weights: ``python benchmarks/random_model.py sd15 OUT``.

Written by diffusers, so that both sides of a benchmark load it under its real names. Kernels are PyTorch's own
initialisation, which keeps activations finite in bfloat16; images are noise, and take as long to sample as any other.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

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
from hypersd_jax.weights.families import FAMILIES

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_model(family: str, folder: Path, dtype: str = "float32") -> Path:
    """Write ``sd15`` or ``sdxl`` unless the folder is there already."""
    if folder.exists():
        return folder
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[dtype])
    configs = FAMILIES[family]
    tokenizer = CLIPTokenizer.from_pretrained(str(assets() / "teacher" / "tokenizer"))
    tokenizer.model_max_length = 77  # as these families have it; the small model's is shorter
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    texts = {}
    for name in ("text_encoder", "text_encoder_2"):
        if name in configs:
            cls = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
            texts[name] = cls(CLIPTextConfig(**{**configs[name], **ids}))
            texts[name.replace("text_encoder", "tokenizer")] = tokenizer
    parts = {
        **texts,
        "unet": UNet2DConditionModel(**{k: v for k, v in configs["unet"].items() if not k.startswith("_")}),
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512 if family == "sd15" else 1024,
            scaling_factor=0.18215 if family == "sd15" else 0.13025,
            force_upcast=False,
        ),
        "scheduler": DDIMScheduler(**SCHEDULER),
    }
    if family == "sdxl":
        pipe = StableDiffusionXLPipeline(**parts)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        pipe.save_pretrained(temporary)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=("sd15", "sdxl"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    options = parser.parse_args()
    print(write_model(options.family, options.folder, options.dtype))
