"""A tiny LoRA in each layout and of each kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.fuzz.bases import as_json, shapes_of, tensor
from benchmarks.fuzz.tensor_mutations import Tensor, packed

RANK = 4
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LINEARS = (f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0")
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.resnets.0.norm1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"

Shape = tuple[int, ...]


def lora_files() -> dict[str, tuple[str, dict[str, bytes]]]:
    """``{kind: (the base that it is for, files)}``."""
    return {
        name: (base, files if isinstance(files, dict) else {"lora.safetensors": packed(*files)})
        for name, base, files in _all()
    }


def _all() -> Iterator[tuple[str, str, Any]]:
    header = {"ss_network_dim": "4", "steps": "4", "sampler": "tcd", "eta": "0.3", "guidance": "0"}
    header |= {"timesteps": "[999, 749, 499, 249]"}
    yield "kohya", "sd1", ([*_kohya(LINEARS), *_kohya((CONV,)), *_kohya((TEXT,), "lora_te_")], header)
    sgm = {f"input_blocks_1_1_{LINEARS[0][27:]}": LINEARS[0], "input_blocks_1_0_in_layers_2": CONV}
    yield "kohya under sgm's names", "sdxl", ([t for name, path in sgm.items() for t in _kohya_one(name, path)], header)
    settings = {"r": RANK, "lora_alpha": 8, "peft_type": "LORA", "target_modules": ["to_q"]}
    settings |= {"rank_pattern": {"to_q": RANK}, "alpha_pattern": {"conv1": 2, "(to_.*|x)": 3}, "use_rslora": False}
    fields = {f"{name}.{key}": value for name in ("unet", "text_encoder") for key, value in settings.items()}
    dotted = [*_dotted("unet.", (*LINEARS, CONV)), *_dotted("text_encoder.", (TEXT,))]
    yield "PEFT", "sd1", (dotted, {"format": "pt", "lora_adapter_metadata": json.dumps(fields)})
    bare = packed(_dotted("base_model.model.", (*LINEARS, CONV)), {"format": "pt"})
    folder = {"adapter_model.safetensors": bare, "adapter_config.json": as_json(settings)}
    yield "PEFT folder", "sd1", folder
    old = [
        (f"unet.{ATTENTION}.processor.{name}_lora.{end}.weight", factor)
        for name, path in (("to_q", LINEARS[0]), ("to_out", LINEARS[1]))
        for end, factor in zip(("down", "up"), _factors(path), strict=True)
    ]
    yield "diffusers, early", "sd1", ([tensor(*pair) for pair in old],)
    yield "diffusers, late", "sd1", (_dotted("unet.", (*LINEARS, CONV), (".lora.down.weight", ".lora.up.weight")),)
    yield "LoCon with lora_mid", "sd1", ([*_kohya(LINEARS), *_mid(CONV)],)
    yield "LoHa", "sd1", ([*_loha(LINEARS[0]), *_loha(CONV), *_tucker_loha("up_blocks.1.resnets.0.conv1")],)
    yield "LoKr", "sd1", (list(_lokr()),)
    magnitudes = [tensor(f"{_name(path)}.dora_scale", (_torch(path)[0], 1)) for path in LINEARS]
    magnitudes += [tensor(f"{_name(CONV)}.dora_scale", (_torch(CONV)[0], 1, 1, 1))]
    yield "DoRA", "sd1", ([*_kohya((*LINEARS, CONV)), *magnitudes],)
    vectors = [tensor(f"unet.{path}.lora_magnitude_vector", _torch(path)[:1]) for path in LINEARS]
    yield "DoRA, PEFT", "sd1", ([*_dotted("unet.", LINEARS), *vectors],)
    full = [tensor(f"{_name(CONV)}.diff", _torch(CONV)), tensor(f"{_name(CONV)}.diff_b", _torch(CONV)[:1])]
    full += [tensor(f"{_name(NORM)}.w_norm", _torch(NORM)), tensor(f"{_name(NORM)}.b_norm", _torch(NORM))]
    yield "full difference", "sd1", (full,)


def _torch(path: str) -> Shape:
    """A module's weight in PyTorch's layout."""
    every = shapes_of("sdxl" if path == "x" else "sd1")
    for shapes in every.values():
        for name in (path, path.removeprefix("text_model.")):
            if f"{name}.kernel" in shapes:
                *window, fan_in, fan_out = shapes[f"{name}.kernel"].shape
                return (fan_out, fan_in, *window)
            if f"{name}.scale" in shapes:
                return tuple(shapes[f"{name}.scale"].shape)
    raise KeyError(path)


def _factors(path: str) -> tuple[Shape, Shape]:
    fan_out, fan_in, *window = _torch(path)
    return (RANK, fan_in, *window), (fan_out, RANK, *(1 for _ in window))


def _name(path: str, prefix: str = "lora_unet_") -> str:
    return prefix + path.replace(".", "_")


def _kohya_one(name: str, path: str, prefix: str = "lora_unet_") -> list[Tensor]:
    down, up = _factors(path)
    key = _name(name, prefix)
    alpha = (f"{key}.alpha", "F32", [], np.float32(2).tobytes())
    return [alpha, tensor(f"{key}.lora_down.weight", down), tensor(f"{key}.lora_up.weight", up, "F16")]


def _kohya(paths: tuple[str, ...], prefix: str = "lora_unet_") -> list[Tensor]:
    return [found for path in paths for found in _kohya_one(path, path, prefix)]


def _dotted(
    prefix: str, paths: tuple[str, ...], ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")
) -> list[Tensor]:
    pairs = ((path, zip(ends, _factors(path), strict=True)) for path in paths)
    return [tensor(f"{prefix}{path}{end}", shape, "BF16") for path, both in pairs for end, shape in both]


def _mid(path: str) -> list[Tensor]:
    fan_out, fan_in, *window = _torch(path)
    name = _name(path)
    return [
        tensor(f"{name}.lora_down.weight", (RANK, fan_in, 1, 1)),
        tensor(f"{name}.lora_mid.weight", (RANK, RANK, *window)),
        tensor(f"{name}.lora_up.weight", (fan_out, RANK, 1, 1)),
        (f"{name}.alpha", "F16", [], np.float16(1).tobytes()),
    ]


def _loha(path: str) -> list[Tensor]:
    fan_out, fan_in, *window = _torch(path)
    shapes = {"a": (fan_out, RANK), "b": (RANK, fan_in * int(np.prod(window)))}
    name = _name(path)
    alpha = (f"{name}.alpha", "F32", [], np.float32(2).tobytes())
    return [alpha, *(tensor(f"{name}.hada_w{half}_{end}", shapes[end]) for half in (1, 2) for end in "ab")]


def _tucker_loha(path: str) -> list[Tensor]:
    fan_out, fan_in, *window = _torch(path)
    shapes = {"w{}_a": (RANK, fan_out), "w{}_b": (RANK, fan_in), "t{}": (RANK, RANK, *window)}
    return [
        tensor(f"{_name(path)}.hada_{part.format(half)}", shape) for half in (1, 2) for part, shape in shapes.items()
    ]


def _lokr() -> Iterator[Tensor]:
    """Whole factors, decomposed ones, and Tucker's."""
    first, second = map(_name, LINEARS)
    yield tensor(f"{first}.lokr_w1", (2, 2))
    yield tensor(f"{first}.lokr_w2", (4, 4))
    yield tensor(f"{second}.lokr_w1_a", (2, 1))
    yield tensor(f"{second}.lokr_w1_b", (1, 2))
    yield tensor(f"{second}.lokr_w2_a", (4, 2))
    yield tensor(f"{second}.lokr_w2_b", (2, 4))
    yield (f"{second}.alpha", "F32", [], np.float32(2).tobytes())
    fan_out, fan_in, *window = _torch(CONV)
    yield tensor(f"{_name(CONV)}.lokr_w1", (2, 2))
    yield tensor(f"{_name(CONV)}.lokr_t2", (2, 2, *window))
    yield tensor(f"{_name(CONV)}.lokr_w2_a", (2, fan_out // 2))
    yield tensor(f"{_name(CONV)}.lokr_w2_b", (2, fan_in // 2))
