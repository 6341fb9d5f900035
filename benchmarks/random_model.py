"""A full-size Stable Diffusion model with random weights: ``python benchmarks/random_model.py sd15 OUT``.

Written by diffusers, so that both sides of a benchmark load it under its real names. Kernels are PyTorch's own
initialisation, which keeps activations finite in bfloat16; images are noise, and take as long to sample as any other.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.model_configs import NAMES, SCHEDULER, Configs, model_configs, text_encoders
from hypersd_jax.weights.components import assets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_pipeline(configs: Configs) -> DiffusionPipeline:
    """Build a pipeline with random weights, in PyTorch's default type and on its default device."""
    tokenizer = CLIPTokenizer.from_pretrained(str(assets() / "teacher" / "tokenizer"))
    tokenizer.model_max_length = 77  # as these families have it; the small model's is shorter
    texts = {}
    for name in text_encoders(configs):
        cls = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        texts[name] = cls(CLIPTextConfig(**configs[name]))
        texts[name.replace("text_encoder", "tokenizer")] = tokenizer
    vae = {name: value for name, value in configs["vae"].items() if not name.startswith("_")}
    parts = {
        **texts,
        "unet": UNet2DConditionModel(**configs["unet"]),
        "vae": AutoencoderKL(**vae),
        "scheduler": DDIMScheduler(**SCHEDULER),
    }
    if "text_encoder_2" in configs:
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def write_model(family: str, folder: Path, dtype: str = "float32") -> Path:
    """Write ``sd15`` or ``sdxl`` unless the folder is there already."""
    if folder.exists():
        return folder
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[dtype])
    pipe = make_pipeline(model_configs(family))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        pipe.save_pretrained(temporary)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=NAMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    options = parser.parse_args()
    print(write_model(options.family, options.folder, options.dtype))
