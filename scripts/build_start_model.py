"""Lay an embedded model out for the networks of another: ``python scripts/build_start_model.py FIRST OUT``.

FIRST has 16 x 16 x 4 latents, as the embedded model had up to commit bca5f9c; OUT has those of
`configs/emoji/networks-f8`, 8 x 8 x 16. What is the same in both keeps its weights: the text encoder, the UNet from
8 x 8 features inwards, the autoencoder from images down to 16 x 16 features. The rest is random, and is trained next:
emoji/autoencoder-f8.yaml.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.weights.components import load_components
from hypersd_jax.weights.diffusers.model import save_model

NETWORKS = Path(__file__).parents[1] / "configs" / "emoji" / "networks-f8"
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "unet": (
        ("time_embedding.linear_2.", "time_embedding.linear_2."),
        ("down_blocks.0.", "down_blocks.1."),
        ("down_blocks.1.", "down_blocks.2."),
        ("mid_block.", "mid_block."),
        ("up_blocks.0.", "up_blocks.0."),
        ("up_blocks.1.", "up_blocks.1."),
    ),
    "vae": (
        ("encoder.conv_in.", "encoder.conv_in."),
        ("encoder.down_blocks.0.", "encoder.down_blocks.0."),
        ("encoder.down_blocks.1.", "encoder.down_blocks.1."),
        ("encoder.down_blocks.2.", "encoder.down_blocks.2."),
        ("decoder.up_blocks.1.", "decoder.up_blocks.0."),
        ("decoder.up_blocks.2.", "decoder.up_blocks.1."),
        ("decoder.up_blocks.3.", "decoder.up_blocks.2."),
        ("decoder.conv_norm_out.", "decoder.conv_norm_out."),
        ("decoder.conv_out.", "decoder.conv_out."),
    ),
}
"""Beginnings of parameter paths, new and old, of what is the same in both."""

# The last resnet reads the features (128 channels) and then a skip, which is another one now.
JOINED, FEATURES = "up_blocks.1.resnets.1.", 128
TIME = "time_embedding.linear_1."


def main() -> None:
    """Read both, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path, help="folder of the model with 16 x 16 x 4 latents")
    parser.add_argument("output", type=Path, help="folder of the new model; must not exist")
    options = parser.parse_args()
    old = load_components(options.first, dtype=jnp.float32)
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder) / "model"
        shutil.copytree(options.first, described, ignore=shutil.ignore_patterns("diffusion_pytorch_model.*"))
        shutil.copytree(NETWORKS, described, dirs_exist_ok=True)
        new = load_components(described, dtype=jnp.float32, fresh=tuple(RENAMED))
    params = dict(new.params)
    for part, renamed in RENAMED.items():
        params[part] = {**new.params[part], **dict(kept(old.params[part], new.params[part], renamed))}
    params["unet"] |= dict(joined(old.params["unet"], new.params["unet"]))
    params["unet"] |= dict(time_embedding(old.params["unet"], new.params["unet"]))
    save_model(dataclasses.replace(new, params=params), options.output)
    for part in RENAMED:
        same = sum(value is not new.params[part][path] for path, value in params[part].items())
        print(f"{part}: {same} of {len(params[part])} parameters keep their values")


def kept(
    old: Mapping[str, jax.Array], new: Mapping[str, jax.Array], renamed: tuple[tuple[str, str], ...]
) -> Iterator[tuple[str, jax.Array]]:
    """Yield the parameters that are the same in both but for their path."""
    for here, there in renamed:
        for path in new:
            source = old.get(there + path.removeprefix(here)) if path.startswith(here) else None
            if source is not None and source.shape == new[path].shape:
                yield path, source


def joined(old: Mapping[str, jax.Array], new: Mapping[str, jax.Array]) -> Iterator[tuple[str, jax.Array]]:
    """Yield the parameters of the last resnet that read the features, those that read its skip being random."""
    for path in (
        path for path in new if path.startswith(JOINED) and path in old and old[path].shape != new[path].shape
    ):
        value = np.array(new[path])
        part = (..., slice(FEATURES), slice(None)) if path.endswith("kernel") else slice(FEATURES)
        value[part] = np.asarray(old[path])[part]
        yield path, jnp.asarray(value)


def time_embedding(old: Mapping[str, jax.Array], new: Mapping[str, jax.Array]) -> Iterator[tuple[str, jax.Array]]:
    """Yield the first layer of the time embedding: every second of the new frequencies is one of the old ones."""
    kernel = np.zeros(new[TIME + "kernel"].shape, np.float32)
    kernel[::2] = np.asarray(old[TIME + "kernel"])
    yield TIME + "kernel", jnp.asarray(kernel)
    yield TIME + "bias", old[TIME + "bias"]


if __name__ == "__main__":
    main()
