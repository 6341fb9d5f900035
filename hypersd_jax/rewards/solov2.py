"""SOLOv2's weights, which the structure term of human feedback looks at images with (Hyper-SD, Eq. 14).

They are for non-commercial use only and not part of this package, see `models.solov2`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from hypersd_jax.config import build
from hypersd_jax.errors import UserError
from hypersd_jax.models.functional import Network
from hypersd_jax.models.solov2 import SoloV2Config, solov2
from hypersd_jax.rewards.reward import weights_path
from hypersd_jax.weights.diffusers.component import read_json
from hypersd_jax.weights.located import read_located
from hypersd_jax.weights.single_file.keys import Stored
from hypersd_jax.weights.tensors import open_tensors

FILE, CONFIG = "model.safetensors", "config.json"
# Counters of batch norms, and the classifier of ImageNet where the backbone was saved with it.
EXTRAS = re.compile(r"\.num_batches_tracked$|^(backbone\.)?fc\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedSoloV2:
    """SOLOv2 with its weights.

    Attributes:
        config: its sizes, grids and scale ranges.
        network: ``network(params, images (B, H, W, 3) in 0..1) -> SoloV2Output``, to be traced.
        params: its first argument.
    """

    config: SoloV2Config
    network: Network
    params: Mapping[str, jax.Array]


def load_solov2(path: str | os.PathLike[str], config: SoloV2Config | None = None) -> LoadedSoloV2:
    """SOLOv2, computed in float32.

    Args:
        path: a file that is ``SOLOv2_R50_3x.pth`` after ``hypersd convert reward``, or a folder with it under the name
            ``model.safetensors``.
        config: sizes that the file must have; None: those of the folder's ``config.json``, the fields of
            `SoloV2Config`, else ResNet-50 on COCO.

    Raises:
        UserError: one line naming the file, and the keys that are missing, unknown or of another shape.
    """
    path = weights_path(path)
    config = config or _config(path)
    network = solov2(config)
    with open_tensors(path / FILE if path.is_dir() else path) as file:
        read = read_located(file.path, [file], network.shapes, Stored.named, EXTRAS)
        params = {name: jnp.asarray(array) for name, array in read}
    return LoadedSoloV2(config=config, network=network, params=params)


def _config(path: Path) -> SoloV2Config:
    """The sizes that a folder's config.json gives; without one the defaults."""
    file = path / CONFIG
    if not file.is_file():
        return SoloV2Config()
    content = read_json(file)
    try:
        return build(SoloV2Config, content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
