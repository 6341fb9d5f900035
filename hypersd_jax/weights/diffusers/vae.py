"""An autoencoder to use in place of a model's own: large or tiny, in diffusers' folder layout, or in one file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from hypersd_jax.errors import UserError
from hypersd_jax.models.autoencoder import AnyVaeConfig, read_vae_config, vae_network
from hypersd_jax.models.functional import Network, Params
from hypersd_jax.models.vae_tiny_config import TinyVaeConfig
from hypersd_jax.weights.diffusers.component import read_json, read_params
from hypersd_jax.weights.hub import fetch_model
from hypersd_jax.weights.keys import canonical_key, drop_pointwise
from hypersd_jax.weights.placement import batch_sharding, leaf_sharding, put
from hypersd_jax.weights.single_file.component import Read, read_part
from hypersd_jax.weights.single_file.keys import IGNORED, VAE, Stored, canonical, vae_locations
from hypersd_jax.weights.tensors import open_tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedVae:
    """An autoencoder's shape, network and parameters."""

    config: AnyVaeConfig
    network: Network
    params: Params


def load_vae(
    source: str | os.PathLike[str], *, vae_config: AnyVaeConfig, dtype: Any, mesh: Mesh | None = None
) -> LoadedVae:
    """Read an autoencoder that goes with a given model.

    Args:
        source: a folder with ``config.json`` and safetensors, a single .safetensors file, or a hub id of either. A file
            says nothing of its structure, so it must be that of the model's own autoencoder.
        vae_config: of the model's own autoencoder.
        dtype: of parameters and computation; see `vae_network`.
        mesh: as in `load_components`.

    Raises:
        UserError: one line naming the file or key that is missing, damaged, unsupported or does not fit the model.
    """
    found = fetch_model(source)
    config, read = _open_file(found, vae_config) if found.is_file() else _open_folder(found)
    if config.latent_channels != vae_config.latent_channels:
        raise UserError(
            f"{found}: latent_channels={config.latent_channels}, but the model has {vae_config.latent_channels}"
        )
    network = vae_network(config, dtype=dtype, batch_sharding=None if mesh is None else batch_sharding(mesh))
    placed = {}
    for path, array in read(network.shapes, next(iter(network.shapes.values())).dtype):
        leaf = network.shapes[path]
        placed[path] = put(array, None if mesh is None else leaf_sharding(mesh, leaf.shape, leaf.dtype))
    return LoadedVae(config=config, network=network, params={path: placed[path] for path in network.shapes})


def _open_folder(folder: Path) -> tuple[AnyVaeConfig, Read]:
    path = folder / "config.json"
    values = read_json(path)
    try:
        config = read_vae_config(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, lambda shapes, dtype: read_params(folder, shapes, dtype=dtype, component_kind="vae")


def _open_file(path: Path, config: AnyVaeConfig) -> tuple[AnyVaeConfig, Read]:
    """An autoencoder alone, or the one within a complete checkpoint."""
    if isinstance(config, TinyVaeConfig):
        raise UserError(f"{path}: the model's own autoencoder is a tiny one, for which only folders are read")
    file = open_tensors(path)
    keys = set(file.keys())
    own = {key for key in keys if key.startswith(VAE)}
    prefix, keys = (VAE, own) if own else ("", keys)
    keys = {key for key in keys if not IGNORED.search(key)}
    if f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in keys:
        # Files of before diffusers 0.16 spell the middle's attention in its older way.
        older = {canonical_key(key.removeprefix(prefix), "vae"): key for key in keys}

        def plain(key: str) -> Stored:
            pointwise = drop_pointwise(key, (1, 1, 1, 1), "vae") == (1, 1)
            return Stored(key=older.get(key, prefix + key), pointwise=pointwise)

        return config, read_part(file, keys, plain)
    levels = len(config.channels)
    # How a file spells the canonical keys of the original program; they differ in the middle's attention.
    spelt = {canonical(VAE + key.removeprefix(prefix)): key for key in keys}

    def location(key: str) -> Stored:
        stored = vae_locations([key], levels)[key]
        name = spelt.get(stored.key, prefix + stored.key.removeprefix(VAE))
        return Stored(key=name, pointwise=stored.pointwise)

    return config, read_part(file, keys, location)
