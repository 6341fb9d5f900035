"""A model in one .safetensors file, in the layout of the original Stable Diffusion programs: read and written.

Such a file holds weights only. What else a model is made of is taken, in this order, from the caller, from a header
entry that `save_single_file` writes, or from the tensors (`configs`); the tokenizer is CLIP's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hypersd_jax.errors import UserError, shown
from hypersd_jax.models.functional import Network
from hypersd_jax.models.vae_tiny_config import TinyVaeConfig
from hypersd_jax.weights import families
from hypersd_jax.weights.assembly import (
    Components,
    Description,
    HostParams,
    Params,
    Shapes,
    StoredModel,
    Structure,
    load,
    networks,
    parse,
)
from hypersd_jax.weights.diffusers.component import cast, read_finite, require_fit
from hypersd_jax.weights.keys import from_torch, to_torch, torch_key, torch_shape
from hypersd_jax.weights.placement import host
from hypersd_jax.weights.single_file import keys
from hypersd_jax.weights.single_file.configs import Generation, Sizes, component_configs, generation, prediction_type
from hypersd_jax.weights.single_file.header import pad_token, read_header, unusual_tokenizers, write_header
from hypersd_jax.weights.single_file.keys import Stored
from hypersd_jax.weights.single_file.notes import settings_lost
from hypersd_jax.weights.tensors import TensorFile, open_tensors, save_tensors
from hypersd_jax.weights.tokenizers import CLIP_TOKENS, clip_tokenizer

Configs = Mapping[str, Mapping[str, Any]]
Locations = dict[str, Stored]
"""``{our parameter path: location in the single file}``."""


def load_single_file(
    path: str | os.PathLike[str],
    *,
    dtype: Any,
    remat: bool = False,
    mesh: Mesh | None = None,
    configs: Configs | None = None,
) -> Components:
    """Read a model from one file: `open_single_file`, then `assembly.load`, whose arguments these are."""
    return load(open_single_file(path, configs=configs), dtype=dtype, remat=remat, mesh=mesh)


def open_single_file(path: str | os.PathLike[str], *, configs: Configs | None = None) -> StoredModel:
    """Describe the model in a single file of SD 1.x, SD 2.x or SDXL; its weights are read later.

    Args:
        path: a .safetensors file.
        configs: ``{component: config.json}``, and under "scheduler" the scheduler's, in place of what the file says.

    Raises:
        UserError: one line naming the file, and the part or key that is missing, unsupported or damaged.
    """
    file = open_tensors(path)
    names = _canonical_names(file)
    sizes = {name: _shape(file, key) for name, key in names.items()}
    kind = generation(sizes, file.path)
    stated = read_header(file, kind)
    given = {**stated.configs, **(configs or {})}
    scheduler = given.get("scheduler") or _scheduler(file, names, sizes, kind)
    prediction = str(scheduler.get("prediction_type", "epsilon"))
    parts = component_configs(sizes, kind, file.path, prediction=prediction, given=given)
    latents = parts["vae"].get("latent_channels", 4)  # of the caller or the header, so not yet known to be a number
    inpainting = isinstance(latents, int) and parts["unet"].get("in_channels", 4) == 2 * latents + 1
    tokenizers = dict(stated.tokenizers)
    for name in parts:
        role = name.replace("text_encoder", "tokenizer")
        if name.startswith("text_encoder") and role not in tokenizers:
            tokens = parts[name].get("vocab_size", CLIP_TOKENS)
            if tokens != CLIP_TOKENS:
                raise UserError(
                    f"{file.path}: the {name} knows {shown(tokens)} tokens, but single files come without a tokenizer "
                    f"and CLIP's has {CLIP_TOKENS}"
                )
            tokenizers[role] = clip_tokenizer(pad_token(kind, role), parts[name].get("max_position_embeddings", 77))
    description = Description(
        origin=file.path,
        configs=parts,
        scheduler_config=scheduler,
        model_index=stated.model_index
        or families.model_index(
            str(scheduler.get("_class_name", families.SCHEDULERS[kind]["_class_name"])),
            xl=kind == "sdxl",
            inpainting=inpainting,
        ),
        tokenizers=tokenizers,
    )
    structure = parse(description)

    def read(shapes: Mapping[str, Shapes], dtypes: Mapping[str, Any]) -> Mapping[str, HostParams]:
        locations = {name: locations_of(name, shapes[name], structure, kind) for name in shapes}
        _require_tensors(file, names, shapes, locations, structure)
        return {name: _read(file, names, shapes[name], locations[name], dtypes[name]) for name in shapes}

    return StoredModel(description=description, read=read)


def save_single_file(
    components: Components,
    path: str | os.PathLike[str],
    *,
    params: Mapping[str, Params] | None = None,
    dtype: Any = None,
) -> None:
    """Write a model as one file that ComfyUI, A1111, diffusers and this package read.

    Args:
        components: the model.
        path: the .safetensors file; replaced in one step, or left as it was.
        params: by component, in place of the model's own, such as weights with a LoRA fused in.
        dtype: type to write; None keeps that of each parameter.

    Raises:
        UserError: the file cannot be written, or a value is too large for `dtype`.
    """
    weights = components.params if params is None else params
    write_single_file(components.description, path, weights.__getitem__, dtype=dtype)


def write_single_file(
    description: Description,
    path: str | os.PathLike[str],
    weights: Callable[[str], Mapping[str, jax.Array | np.ndarray]],
    *,
    dtype: Any = None,
) -> None:
    """Write the file of `save_single_file`, with each component's weights asked for when they are written."""
    target = Path(path)
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: name a file that ends in .safetensors")
    structure = parse(description)
    kind = generation_of(structure, description.is_xl)
    tensors: dict[str, np.ndarray] = {}
    for name, network in _networks(structure).items():
        locations = locations_of(name, network.shapes, structure, kind)
        tensors |= _stored(weights(name), locations, dtype, target)
    if kind != "sd2":  # whose readers expect v anyway
        tensors |= _marks(description)
    header = write_header(description, structure, kind)
    save_tensors(target, tensors, header)
    notes = settings_lost({key: value.shape for key, value in tensors.items()}, description, structure, kind, target)
    notes += [f"{role} (not CLIP's)" for role in unusual_tokenizers(description, structure, kind)]
    if notes:
        what = ", ".join(notes)
        warnings.warn(
            f"{target}: only this package reads these from the file, others take the usual: {what}", stacklevel=3
        )


def generation_of(structure: Structure, xl: bool) -> Generation:
    """The layout that a model is written in: SD 2.x's where its text encoder is OpenCLIP's."""
    if xl:
        return "sdxl"
    return "sd1" if structure.text["text_encoder"].hidden_act == "quick_gelu" else "sd2"


def _canonical_names(file: TensorFile) -> dict[str, str]:
    """Canonical key -> stored key, in the file's order."""
    names: dict[str, str] = {}
    for key in file.keys():  # noqa: SIM118 - not a mapping
        name = keys.canonical(key)
        if name in names:
            raise UserError(f"{file.path}: {names[name]} and {key} are the same tensor in two spellings")
        names[name] = key
    return names


def _shape(file: TensorFile, key: str) -> tuple[int, ...]:
    """A stored tensor's shape under its canonical name."""
    return file.shape(key)[::-1] if key == keys.FLIPPED else file.shape(key)


def _networks(structure: Structure) -> dict[str, Network]:
    return networks(structure, dict.fromkeys(structure.components, np.float32))


def _scheduler(file: TensorFile, names: Mapping[str, str], sizes: Sizes, kind: Generation) -> dict[str, Any]:
    step = None
    if "global_step" in names and file.shape(names["global_step"]) in ((), (1,)):
        step = float(file.read(names["global_step"]).item())
    # SD-Turbo, the one SD 2.x model in this spelling, predicts noise.
    turbo = any(key.startswith("conditioner.embedders.0.model.") for key in names.values())
    guess = "epsilon" if turbo and kind == "sd2" else prediction_type(sizes, kind, file.metadata, step, file.path)
    config = {**families.SCHEDULERS[kind], "prediction_type": guess}
    if "ztsnr" in names:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def locations_of(component: str, shapes: Shapes, structure: Structure, kind: Generation) -> Locations:
    """Find the locations of a component's parameters in a file of this generation."""
    canonical = {path: torch_key(path) for path in shapes}
    found = canonical.values()
    if component == "unet":
        locations = keys.unet_locations(found, structure.unet)
    elif component == "vae":
        if isinstance(structure.vae, TinyVaeConfig):
            raise UserError("vae: a tiny autoencoder has no place in a single file; use the model's own, or a folder")
        locations = keys.vae_locations(found, len(structure.vae.channels))
    elif component == "text_encoder_2":
        locations = keys.open_clip_locations(found, keys.OPEN_CLIP_XL)
    elif kind == "sd2":
        locations = keys.open_clip_locations(found, keys.OPEN_CLIP)
    else:
        locations = keys.clip_locations(found, keys.CLIP if kind == "sd1" else keys.CLIP_XL)
    return {path: locations[key] for path, key in canonical.items()}


def _require_tensors(
    file: TensorFile,
    names: Mapping[str, str],
    shapes: Mapping[str, Shapes],
    locations: Mapping[str, Locations],
    structure: Structure,
) -> None:
    """One UserError with every tensor that is missing, unknown, of the wrong shape or no number."""
    missing: dict[str, None] = {}
    misfits: dict[str, None] = {}
    wanted = set()
    for component, found in locations.items():
        for path, location in found.items():
            if location.key not in names:
                missing[location.key] = None
                continue
            wanted.add(location.key)
            stored = names[location.key]
            shape = torch_shape(path, shapes[component][path].shape)
            allowed = [location.shape(shape), shape] if location.pointwise else [location.shape(shape)]
            size = _shape(file, stored)
            if size not in allowed:
                misfits[f"{stored} {list(size)} instead of {list(allowed[0])}"] = None
            elif not jnp.issubdtype(file.dtype(stored), jnp.floating):
                misfits[f"{stored} of type {file.dtype(stored)}"] = None
    unused = _unused_layers(structure)
    unexpected = [
        key for name, key in names.items() if name not in wanted and not keys.IGNORED.search(name) and not unused(name)
    ]
    require_fit(file.path, list(missing), unexpected, list(misfits))


def _unused_layers(structure: Structure) -> Callable[[str], bool]:
    """Tell whether a key is of a layer past the ones that SD 2.x's text encoder keeps."""
    prefix = f"{keys.OPEN_CLIP}transformer.resblocks."
    kept = structure.text["text_encoder"].num_hidden_layers

    def unused(name: str) -> bool:
        number = name.removeprefix(prefix).partition(".")[0]
        return name.startswith(prefix) and number == str(kept)

    return unused


def _read(file: TensorFile, names: Mapping[str, str], shapes: Shapes, locations: Locations, dtype: Any) -> HostParams:
    """The parameters of one component in the order of the file, tensor by tensor."""
    users: dict[str, list[str]] = {}
    for path, location in locations.items():
        users.setdefault(location.key, []).append(path)
    for name, key in names.items():
        if name not in users:
            continue
        stored = read_finite(file, key)
        stored = stored.T if key == keys.FLIPPED else stored
        for path in users[name]:
            location = locations[path]
            array = location.take(stored).reshape(torch_shape(path, shapes[path].shape))
            yield path, cast(from_torch(path, array), dtype, file.path, key)


def _stored(
    params: Mapping[str, jax.Array | np.ndarray], locations: Locations, dtype: Any, target: Path
) -> dict[str, np.ndarray]:
    """One component's tensors by the keys of the single file."""
    fused: dict[str, dict[int, np.ndarray]] = {}
    tensors: dict[str, np.ndarray] = {}
    for path, location in locations.items():
        array = cast(to_torch(path, host(params[path])), dtype, target, location.key)
        if location.part is not None:
            fused.setdefault(location.key, {})[location.part] = array
        else:
            tensors[location.key] = (array.T if location.transposed else array).reshape(location.shape(array.shape))
    for key, thirds in fused.items():
        tensors[key] = np.concatenate([thirds[part] for part in range(3)])
    return tensors


def _marks(description: Description) -> Iterator[tuple[str, np.ndarray]]:
    """Empty tensors by which other programs tell an SD 1.x or SDXL model that predicts v."""
    config = description.scheduler_config
    if config.get("prediction_type") == "v_prediction":
        yield "v_pred", np.zeros(0, np.float32)
        if config.get("rescale_betas_zero_snr"):
            yield "ztsnr", np.zeros(0, np.float32)
