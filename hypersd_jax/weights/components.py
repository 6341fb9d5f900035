"""A Stable Diffusion model from wherever it is, as networks and parameters."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax.paths import require_model_folder
from hypersd_jax.weights.assembly import Components as Components
from hypersd_jax.weights.assembly import Params as Params
from hypersd_jax.weights.assembly import StoredModel, load
from hypersd_jax.weights.diffusers.model import open_folder
from hypersd_jax.weights.hub import fetch_description, fetch_model
from hypersd_jax.weights.single_file import open_single_file

EMBEDDED = "embedded"


def assets() -> Path:
    """The folder of what ships inside the package: teacher, images, feature network, LoRAs."""
    return Path(str(resources.files("hypersd_jax"))) / "assets"


def resolve_source(source: str | Path, *, weights: bool = True) -> Path:
    """The model folder or single file that ``source`` names, fetched where it is a hub id; see `open_model`."""
    if str(source) == EMBEDDED:
        return assets() / "teacher"
    path = fetch_model(source) if weights else fetch_description(source)
    if path.is_dir():
        require_model_folder(path)
    return path


def open_model(source: str | Path, *, weights: bool = True) -> StoredModel:
    """Describe the model that ``source`` names; its weights are read later.

    Args:
        source: a diffusers folder (``model_index.json``), a single .safetensors file, a hub id of either
            (`weights.hub`), or ``embedded`` for the model inside the package.
        weights: False: they will not be read, so that those of a hub model in diffusers' layout are not fetched.

    Raises:
        UserError: one line naming the file or key that is missing, unsupported or damaged.
    """
    path = resolve_source(source, weights=weights)
    return open_folder(path) if path.is_dir() else open_single_file(path)


def load_components(
    source: str | Path,
    *,
    dtype: Any,
    remat: bool = False,
    mesh: Mesh | None = None,
    param_dtype: Any = None,
    fresh: Collection[str] = (),
    seed: int = 0,
) -> Components:
    """Read every part of a model.

    Args:
        source: see `open_model`.
        dtype: compute and parameter dtype of all parts, except that an autoencoder that says ``force_upcast`` stays in
            float32 where this is float16.
        remat: recompute the UNet's activations block by block in the backward pass.
        mesh: devices with axes ``data`` and ``fsdp``: large parameters are split over ``fsdp``, and the UNet's
            activations stay on the batch axes. None is the default device.
        param_dtype: of the parameters, where it is not that of the computation: float32 for weights that are trained.
        fresh: components whose weights are random instead, from ``seed``.
        seed: see ``fresh``.

    Raises:
        UserError: one line naming the file or key that is missing, unsupported or damaged.
    """
    stored = open_model(source)
    return load(stored, dtype=dtype, remat=remat, mesh=mesh, param_dtype=param_dtype, fresh=fresh, seed=seed)


def describe_components(
    source: str | Path,
    *,
    dtype: Any,
    remat: bool = False,
    mesh: Mesh | None = None,
    param_dtype: Any = None,
    fresh: Collection[str] = (),
    read: Collection[str] = (),
) -> Components:
    """Make the components of `load_components` with `jax.ShapeDtypeStruct`s in place of their parameters.

    Of weights that are here the names, shapes and types are checked, and hardly any tensor is read.

    Args:
        source, dtype, remat, mesh, param_dtype, fresh: as of `load_components`.
        read: components whose parameters are read all the same, onto the default device.

    Raises:
        UserError: as `load_components`, but for values that are not finite.
    """
    stored = open_model(source, weights=bool(read))
    found: list[Components] = []

    def shapes_of(wanted: Mapping[str, Any], dtypes: Mapping[str, Any]) -> Any:
        if read or str(source) == EMBEDDED or os.path.exists(source):
            for tensors in stored.read(wanted, dtypes).values():
                next(iter(tensors), None)  # behind the check of all that the component's files hold
        return {
            name: ((path, jnp.zeros(leaf.shape, dtypes[name])) for path, leaf in wanted[name].items())
            for name in wanted
        }

    def params() -> Any:
        how: dict[str, Any] = {"dtype": dtype, "remat": remat, "param_dtype": param_dtype, "fresh": fresh}
        found.append(load(dataclasses.replace(stored, read=shapes_of), mesh=mesh, **how))
        return dict(found[0].params)

    known: dict[str, Any] = jax.eval_shape(params)
    for name in read:
        types = {name: next(iter(known[name].values())).dtype}
        tensors = dict(stored.read({name: known[name]}, types)[name])
        known[name] = {path: jnp.asarray(tensors[path]) for path in known[name]}
    return dataclasses.replace(found[0], params=known)


def default_dtype() -> Any:
    """bfloat16 where the hardware has it, float32 on a CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
