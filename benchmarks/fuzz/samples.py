"""One small sound file, or folder, of each kind that is read; all in memory, written by nobody but us."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from benchmarks.fuzz import bases, loads
from benchmarks.fuzz.lora_samples import lora_files
from benchmarks.fuzz.tensor_mutations import Tensor, packed, unpacked
from hypersd_jax.weights import families
from hypersd_jax.weights.assembly import Description, networks, parse
from hypersd_jax.weights.single_file import write_single_file
from hypersd_jax.weights.tokenizers import clip_tokenizer


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sound input.

    Attributes:
        kind: its name in the tables.
        group: kinds that are one to the command line: "lora", "model" or "" for what it has no option for.
        weight: how often it is drawn, against the others.
        files: content by path.
        target: which of the paths is loaded; "" is the folder.
        load: reads it, and raises where the result is not sound.
        base: for a LoRA, the model of `bases` that it is for.
    """

    kind: str
    group: str
    weight: float
    files: Mapping[str, bytes]
    target: str
    load: Callable[[Path], None]
    base: str = ""


def samples() -> list[Sample]:
    """All of them."""
    found = [
        Sample(
            kind=f"LoRA, {name}",
            group="lora",
            weight=10,
            files=files,
            target="" if len(files) > 1 else next(iter(files)),
            load=functools.partial(loads.lora, base),
            base=base,
        )
        for name, (base, files) in lora_files().items()
    ]
    for kind in ("sd1", "sdxl"):
        files = bases.model_files(kind)
        found.append(Sample(kind=f"folder, {kind}", group="model", weight=4, files=files, target="", load=loads.model))
    for kind in ("sd1", "sd2", "sdxl"):
        files = {"model.safetensors": single_file(kind)}
        found.append(_single(f"single file, {kind}", 2, files))
    found.append(_single("single file without header, sd1", 0.3, {"model.safetensors": bare_file()}))
    control = bases.weights_of(bases.controlnet_shapes())
    weights = "diffusion_pytorch_model.safetensors"
    vae_shapes = bases.shapes_of("sd1")["vae"]
    plain = bases.shapes_of("sd1")["unet"]
    return [
        *found,
        _part(
            "ControlNet folder",
            3,
            {"config.json": bases.as_json(bases.CONTROLNET), weights: control},
            "",
            loads.controlnet,
        ),
        _part("ControlNet file", 1, {"control.safetensors": control}, "control.safetensors", loads.controlnet),
        _part(
            "autoencoder folder",
            2,
            {"config.json": bases.as_json(bases.VAE), weights: bases.weights_of(vae_shapes)},
            "",
            loads.vae,
        ),
        _part("autoencoder file", 1, {"vae.safetensors": bases.weights_of(vae_shapes)}, "vae.safetensors", loads.vae),
        _part(
            "tiny autoencoder folder",
            4,
            {"config.json": bases.as_json(bases.TINY_VAE), weights: bases.weights_of(bases.tiny_vae_shapes())},
            "",
            loads.vae,
        ),
        _part("shards", 3, shards(bases.tensors_of(plain)), "", loads.component),
        _part(
            "scheduler_config.json",
            20,
            {"scheduler_config.json": bases.as_json(families.SCHEDULERS["sdxl"])},
            "scheduler_config.json",
            loads.scheduler,
        ),
        _part("tokenizer", 2, bases.tokenizer().files, "", loads.tokenizer),
    ]


def shards(tensors: list[Tensor]) -> dict[str, bytes]:
    """A component in two files and an index."""
    halves = tensors[::2], tensors[1::2]
    names = [f"diffusion_pytorch_model-{n}-of-00002.safetensors" for n in ("00001", "00002")]
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key, *_ in half}
    index = {"metadata": {"total_size": sum(len(data) for *_, data in tensors)}, "weight_map": weight_map}
    return {
        "diffusion_pytorch_model.safetensors.index.json": bases.as_json(index),
        **{name: packed(half) for name, half in zip(names, halves, strict=True)},
    }


def single_file(kind: str) -> bytes:
    """A whole model in one file that says all of itself in its header."""
    roles = ("tokenizer", "tokenizer_2") if kind == "sdxl" else ("tokenizer",)
    return _written(kind, bases.MODELS[kind], {role: bases.tokenizer() for role in roles})


def bare_file() -> bytes:
    """One whose shapes say all, as other programs write it; in 8 bits, for CLIP's vocabulary is large."""
    content = _written("sd1", bases.BARE, {"tokenizer": clip_tokenizer("<|endoftext|>", 16)}, jnp.float8_e4m3fn)
    return packed(unpacked(content)[0])


def _written(kind: str, configs: Mapping, tokenizers: Mapping, dtype: object = jnp.float16) -> bytes:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other programs will not read it as we do
        path = Path(folder) / "model.safetensors"
        description = Description(
            origin=path,
            configs=configs,
            scheduler_config=families.SCHEDULERS[kind],
            model_index=families.model_index("DDIMScheduler", xl=kind == "sdxl", inpainting=False),
            tokenizers=tokenizers,
        )
        structure = parse(description)
        parts = networks(structure, dict.fromkeys(structure.components, jnp.float32))
        params = {name: part.init(0) for name, part in parts.items()}
        write_single_file(description, path, params.__getitem__, dtype=dtype)
        return path.read_bytes()


def _single(kind: str, weight: float, files: Mapping[str, bytes]) -> Sample:
    return Sample(kind=kind, group="model", weight=weight, files=files, target="model.safetensors", load=loads.model)


def _part(kind: str, weight: float, files: Mapping[str, bytes], target: str, load: Callable[[Path], None]) -> Sample:
    return Sample(kind=kind, group="", weight=weight, files=files, target=target, load=load)
