"""The tiny models that fuzzed files belong to: configurations, networks, and their weights as safetensors bytes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np

from benchmarks.fuzz.tensor_mutations import Tensor, packed
from hypersd_jax.models.clip_text import ClipTextConfig, clip_text
from hypersd_jax.models.controlnet import controlnet
from hypersd_jax.models.controlnet_config import ControlNetConfig
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.models.vae import VaeConfig, vae
from hypersd_jax.models.vae_tiny import tiny_vae
from hypersd_jax.models.vae_tiny_config import TinyVaeConfig
from hypersd_jax.weights import assembly, families
from hypersd_jax.weights.diffusers import controlnet as controlnet_folder
from hypersd_jax.weights.diffusers import vae as vae_folder
from hypersd_jax.weights.keys import torch_key, torch_shape
from hypersd_jax.weights.tokenizers import END, START, TokenizerFiles

TOKENS = 514

_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
_TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "hidden_act": "quick_gelu",
    "bos_token_id": TOKENS - 2,
    "eos_token_id": TOKENS - 1,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 0.2,
}
TINY_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}
CONTROLNET: dict[str, Any] = {
    "_class_name": "ControlNetModel",
    **{key: value for key, value in _UNET.items() if key not in ("_class_name", "sample_size", "up_block_types")},
    "conditioning_embedding_out_channels": [8, 8],
}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {"unet": _UNET, "vae": VAE, "text_encoder": _TEXT},
    "sd2": {
        "unet": {**_UNET, "use_linear_projection": True, "attention_head_dim": [1, 2]},
        "vae": VAE,
        "text_encoder": {**_TEXT, "hidden_act": "gelu"},
    },
    "sdxl": {
        "unet": {
            **_UNET,
            "cross_attention_dim": 32,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 2,
            "projection_class_embeddings_input_dim": 6 * 2 + 8,
            "transformer_layers_per_block": [1, 2],
        },
        "vae": VAE,
        "text_encoder": _TEXT,
        "text_encoder_2": {**_TEXT, "hidden_act": "gelu", "projection_dim": 8},
    },
}
"""``{generation: {component: config.json}}``."""

# An SD 1.x whose file needs no header: heads, groups and vocabulary are the family's own.
BARE: dict[str, dict[str, Any]] = {
    "unet": {
        **_UNET,
        "block_out_channels": [32, 64],
        "norm_num_groups": 32,
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
    },
    "vae": {**VAE, "block_out_channels": [32, 32], "norm_num_groups": 32},
    "text_encoder": {**_TEXT, "vocab_size": 49408, "hidden_size": 64, "num_attention_heads": 1},
}

unet_of = functools.lru_cache(16)(unet)
vae_of = functools.lru_cache(16)(vae)
clip_of = functools.lru_cache(16)(clip_text)


@contextmanager
def built_once() -> Iterator[None]:
    """Lets the loaders build each network once for each configuration: taking one apart is most of what they do."""
    with ExitStack() as stack:
        for module, name, make in (
            (assembly, "unet", unet_of),
            *(
                (module, "vae_network", functools.lru_cache(16)(module.vae_network))
                for module in (assembly, vae_folder)
            ),
            (assembly, "clip_text", clip_of),
            (controlnet_folder, "controlnet", functools.lru_cache(16)(controlnet)),
        ):
            stack.enter_context(mock.patch.object(module, name, make))
        yield


def shapes_of(kind: str) -> dict[str, Mapping[str, Any]]:
    """Parameter shapes of every component of a base."""
    configs = MODELS[kind]
    shapes: dict[str, Mapping[str, Any]] = {
        "unet": unet_of(UNetConfig.from_dict(configs["unet"]), dtype=jnp.float32).shapes,
        "vae": vae_of(VaeConfig.from_dict(configs["vae"]), dtype=jnp.float32).shapes,
    }
    for name in assembly.text_names(kind == "sdxl"):
        config = ClipTextConfig.from_dict(configs[name])
        shapes[name] = clip_of(config, dtype=jnp.float32, projection=name == "text_encoder_2").shapes
    return shapes


def controlnet_shapes() -> Mapping[str, Any]:
    return controlnet(ControlNetConfig.from_dict(CONTROLNET), dtype=jnp.float32).shapes


def tiny_vae_shapes() -> Mapping[str, Any]:
    return tiny_vae(TinyVaeConfig.from_dict(TINY_VAE), dtype=jnp.float32).shapes


def tensor(key: str, shape: tuple[int, ...], dtype: str = "F32") -> Tensor:
    """Small random values, the same for the same key."""
    values = np.random.default_rng(len(key)).standard_normal(shape, np.float32) * 0.1
    raw = values.astype(np.float16) if dtype == "F16" else values
    data = raw.view(np.uint32) >> 16 if dtype == "BF16" else raw
    return key, dtype, list(shape), (data.astype(np.uint16) if dtype == "BF16" else data).tobytes()


def tensors_of(shapes: Mapping[str, Any], dtype: str = "F32") -> list[Tensor]:
    """A component's parameters as diffusers stores them."""
    return [tensor(torch_key(path), torch_shape(path, leaf.shape), dtype) for path, leaf in shapes.items()]


def weights_of(shapes: Mapping[str, Any], dtype: str = "F32") -> bytes:
    """A component's safetensors file."""
    return packed(tensors_of(shapes, dtype), {"format": "pt"})


def model_files(kind: str) -> dict[str, bytes]:
    """A diffusers folder, each part in another type."""
    shapes, files = shapes_of(kind), {}
    for (name, config), dtype in zip(MODELS[kind].items(), ("F32", "F16", "BF16", "F32"), strict=False):
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        files[f"{name}/config.json"] = as_json(config)
        files[f"{name}/{stem}.safetensors"] = weights_of(shapes[name], dtype)
        if name.startswith("text"):
            role = name.replace("text_encoder", "tokenizer")
            files |= {f"{role}/{file}": content for file, content in tokenizer().files.items()}
    files["scheduler/scheduler_config.json"] = as_json(families.SCHEDULERS[kind])
    index = families.model_index("DDIMScheduler", xl=kind == "sdxl", inpainting=False)
    return {**files, "model_index.json": as_json(index)}


def tokenizer() -> TokenizerFiles:
    """A tokenizer that knows bytes only."""
    letters = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    words = [chr(byte) for byte in letters] + [chr(256 + index) for index in range(256 - len(letters))]
    words = [*words, *(f"{word}</w>" for word in words), START, END]
    marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    files = {
        "vocab.json": json.dumps({word: index for index, word in enumerate(words)}).encode(),
        "merges.txt": b"#version: 0.2\n",
        "special_tokens_map.json": as_json(marks),
        "tokenizer_config.json": as_json({**marks, "model_max_length": 16, "tokenizer_class": "CLIPTokenizer"}),
    }
    return TokenizerFiles(origin="tiny", files=files)


def as_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode()


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files into a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder
