"""The loader of each kind of file, and the checks of its result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz import bases
from hypersd_jax import presets
from hypersd_jax.bases.prompting import require_embedded
from hypersd_jax.conditioning import PromptEncoder, load_tokenizer
from hypersd_jax.diffusion import SOLVERS, solver_table
from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.errors import UserError
from hypersd_jax.models.unet_config import UNetConfig
from hypersd_jax.models.vae_config import VaeConfig
from hypersd_jax.weights.assembly import networks, parse
from hypersd_jax.weights.components import open_model
from hypersd_jax.weights.diffusers.component import read_json, read_params
from hypersd_jax.weights.diffusers.controlnet import load_controlnet
from hypersd_jax.weights.diffusers.vae import load_vae
from hypersd_jax.weights.lora import read_lora
from hypersd_jax.weights.tokenizers import tokenizer_files


class Unsound(Exception):
    """A file was read without complaint, and what came out of it is not usable."""


def model(path: Path) -> None:
    """A folder or single file, as `assembly.load` reads it but for placing the arrays on a device."""
    stored = open_model(path)
    structure = parse(stored.description)
    Schedule.from_config(stored.description.scheduler_config)
    dtypes = dict.fromkeys(structure.components, np.float32)
    shapes = {name: part.shapes for name, part in networks(structure, dtypes).items()}
    for name, found in stored.read(shapes, dtypes).items():
        _require(name, dict(found), shapes[name])


def component(path: Path) -> None:
    """The UNet's folder of `bases`, in shards."""
    shapes = bases.shapes_of("sd1")["unet"]
    found = dict(read_params(path, shapes, component_kind="unet", dtype=np.float32))
    _require("unet", found, shapes)


def controlnet(path: Path) -> None:
    config = UNetConfig.from_dict(bases.MODELS["sd1"]["unet"])
    loaded = load_controlnet(path, unet_config=config, downscale=2, dtype=np.float32)
    _require("controlnet", loaded.params, loaded.network.shapes)


def vae(path: Path) -> None:
    loaded = load_vae(path, vae_config=VaeConfig.from_dict(bases.VAE), dtype=np.float32)
    _require("vae", loaded.params, loaded.network.shapes)


def scheduler(path: Path) -> None:
    """The tables of all samplers; all may refuse."""
    config = read_json(path)
    refused = []
    for name in SOLVERS:
        try:
            table = solver_table(name, 4, scheduler_config=config)
        except UserError as error:
            refused.append(error)
            continue
        for key, values in table.items():
            if key != "clip" and not np.isfinite(values).all():
                raise Unsound(f"{name}: {key} is not finite")
    if len(refused) == len(SOLVERS):
        raise refused[0]


def tokenizer(path: Path) -> None:
    """A tokenizer whose ids an encoder of as many tokens embeds."""
    read = load_tokenizer(tokenizer_files(path))
    require_embedded(read, bases.TOKENS, str(path))
    encoder = PromptEncoder(names=("text_encoder",), tokenizers=(read,), networks=(), lengths=(16,), penultimate=False)
    (ids,) = encoder.tokenize(["red apple", ""])
    if ids.shape != (2, 16) or ids.min() < 0 or ids.max() >= bases.TOKENS:
        raise Unsound(f"ids {ids.shape} from {ids.min()} to {ids.max()}")


def lora(kind: str, path: Path) -> None:
    """A LoRA for a base of `bases`, and the sampling settings of its header."""
    shapes = {name: part for name, part in bases.shapes_of(kind).items() if name != "vae"}
    file = read_lora(path, shapes)
    for name, adapter in file.adapters.items():
        for module, entry in adapter.items():
            kernel = shapes[name][f"{module}.kernel"].shape
            rank = len(entry["scale"])
            expected = {"down": (*kernel[:-1], rank), "up": (rank, kernel[-1]), "scale": (rank,)}
            _require_arrays(f"{name}.{module}", entry, expected)
    for name, differences in file.differences.items():
        for module, entry in differences.items():
            weight = shapes[name].get(f"{module}.kernel", shapes[name].get(f"{module}.scale"))
            _require_difference(f"{name}.{module}", entry, weight.shape if weight is not None else ())
    preset = presets.from_header(file.metadata, str(path))
    plan = presets.resolve([preset, presets.BASE_SD])
    config = dict(bases.families.SCHEDULERS["sd1"])
    if plan.original_inference_steps is not None:
        config["original_inference_steps"] = plan.original_inference_steps
    solver_table(
        str(plan.sampler),
        plan.steps,
        eta=float(plan.eta or 0.0),
        spacing=plan.spacing,
        scheduler_config=config,
        timesteps=plan.timesteps,
    )


def _require_difference(where: str, entry: Mapping[str, np.ndarray], weight: tuple[int, ...]) -> None:
    """The parts of a difference multiply to the weight's shape."""
    _require_arrays(where, entry, {name: value.shape for name, value in entry.items()})
    made = {
        "full": lambda: entry["full"].shape,
        "down": lambda: (*entry["down"].shape[:-1], entry["up"].shape[1]),
        "down_2": lambda: (*entry["down_2"].shape[:-1], entry["up_2"].shape[1]),
        "left": lambda: (
            *entry["right"].shape[:-2],
            *(entry["left"].shape[axis] * entry["right"].shape[axis] for axis in (-2, -1)),
        ),
    }
    for name, shape in made.items():
        if name in entry and tuple(shape()) != weight:
            raise Unsound(f"{where}: {name} makes {shape()}, the weight is {weight}")
    if "magnitude" in entry and math.prod(entry["magnitude"].shape) not in weight:
        raise Unsound(f"{where}: magnitude {entry['magnitude'].shape}, the weight is {weight}")
    if "bias" in entry and entry["bias"].shape != weight[-1:]:
        raise Unsound(f"{where}: bias {entry['bias'].shape}, the weight is {weight}")


def _require(name: str, found: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    _require_arrays(name, found, {path: leaf.shape for path, leaf in shapes.items()})


def _require_arrays(where: str, found: Mapping[str, Any], shapes: Mapping[str, Iterable[int]]) -> None:
    if found.keys() != shapes.keys():
        raise Unsound(f"{where}: {sorted(found.keys() ^ shapes.keys())[:3]} on one side only")
    for path, shape in shapes.items():
        array = np.asarray(found[path])
        if array.shape != tuple(shape):
            raise Unsound(f"{where}: {path} is {array.shape}, not {tuple(shape)}")
        if not np.isfinite(array).all():
            raise Unsound(f"{where}: {path} is not finite")
