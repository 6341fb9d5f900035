"""A ControlNet in diffusers' folder layout or in one file, as a network and its parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from hypersd_jax.errors import UserError
from hypersd_jax.models.controlnet import controlnet
from hypersd_jax.models.controlnet_config import ControlNetConfig
from hypersd_jax.models.functional import Network, Params
from hypersd_jax.models.unet_config import UNetConfig
from hypersd_jax.weights.diffusers.component import read_json, read_params
from hypersd_jax.weights.hub import fetch_model
from hypersd_jax.weights.placement import batch_sharding, leaf_sharding, put
from hypersd_jax.weights.single_file.component import Read, Shapes
from hypersd_jax.weights.single_file.controlnet import open_controlnet_file


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedControlNet:
    """A ControlNet's shape, network and parameters."""

    config: ControlNetConfig
    network: Network
    params: Params


def load_controlnet(
    source: str | os.PathLike[str],
    *,
    unet_config: UNetConfig,
    downscale: int,
    dtype: Any,
    mesh: Mesh | None = None,
) -> LoadedControlNet:
    """Read a ControlNet that goes with a given model.

    Args:
        source: a folder with ``config.json`` and safetensors, a single .safetensors file, or a hub id of either.
        unet_config: of the UNet that it steers.
        downscale: image pixels per latent pixel, `VaeConfig.downscale`.
        dtype: of parameters and computation.
        mesh: as in `load_components`.

    Raises:
        UserError: one line naming the file or key that is missing, damaged, unsupported or does not fit the model.
    """
    found = fetch_model(source)
    config, read = open_controlnet_file(found, unet_config) if found.is_file() else _open_folder(found)
    try:
        config.require_fit(unet_config, downscale)
    except UserError as error:
        raise UserError(f"{found}: {error}") from None
    network = controlnet(config, dtype=dtype, batch_sharding=None if mesh is None else batch_sharding(mesh))
    placed = {}
    for path, array in read(network.shapes, dtype):
        leaf = network.shapes[path]
        placed[path] = put(array, None if mesh is None else leaf_sharding(mesh, leaf.shape, leaf.dtype))
    return LoadedControlNet(config=config, network=network, params={path: placed[path] for path in network.shapes})


def _open_folder(folder: Path) -> tuple[ControlNetConfig, Read]:
    path = folder / "config.json"
    values = read_json(path)
    try:
        config = ControlNetConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None

    def read(shapes: Shapes, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
        # Its files are spelt as a UNet's are.
        return read_params(folder, shapes, dtype=dtype, component_kind="unet")

    return config, read
