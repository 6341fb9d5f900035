"""A full-size model of which only the shapes exist, laid out on chips that are described and not there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax.bases import StableDiffusion
from hypersd_jax.weights.assembly import Components, Description, Structure, networks, parse
from hypersd_jax.weights.families import FAMILIES, NATIVE_SIZES, SCALING_FACTORS, SCHEDULERS, VAE, model_index
from hypersd_jax.weights.placement import leaf_sharding
from hypersd_jax.weights.tokenizers import clip_tokenizer

GENERATIONS = {"sd15": "sd1", "sdxl": "sdxl"}
PIXELS_PER_LATENT = 8
DTYPE = jnp.bfloat16


def describe(family: str) -> Description:
    """What the files of the released model state, its autoencoder included."""
    generation, own = GENERATIONS[family], FAMILIES[family]
    xl = "text_encoder_2" in own
    tokens = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    autoencoder = {
        **VAE,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": NATIVE_SIZES[generation],
        "scaling_factor": SCALING_FACTORS[generation],
    }
    texts = {name: {**config, **tokens} for name, config in own.items() if name != "unet"}
    scheduler = {**SCHEDULERS[generation], "prediction_type": "epsilon"}
    return Description(
        origin=Path(family),
        configs={"unet": own["unet"], "vae": autoencoder, **texts},
        scheduler_config=scheduler,
        model_index=model_index(scheduler["_class_name"], xl=xl, inpainting=False),
        tokenizers={name.replace("text_encoder", "tokenizer"): clip_tokenizer("<|endoftext|>") for name in texts},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractModel:
    """Networks whose parameters are shapes with shardings."""

    description: Description
    structure: Structure
    parts: Mapping[str, Any]
    mesh: Mesh

    @classmethod
    def of(cls, family: str, mesh: Mesh, *, remat: bool) -> AbstractModel:
        """Put the networks of a family together."""
        description = describe(family)
        structure = parse(description)
        parts = networks(structure, dict.fromkeys(structure.components, DTYPE), remat=remat, mesh=mesh)
        return cls(description=description, structure=structure, parts=parts, mesh=mesh)

    @property
    def unet(self) -> Any:
        """The UNet."""
        return self.parts["unet"]

    def shapes(self, part: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Parameters of a part."""
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, DTYPE, sharding=leaf_sharding(self.mesh, leaf.shape, DTYPE))
            for path, leaf in self.parts[part].shapes.items()
        }

    def components(self, params: Mapping[str, Any]) -> Components:
        """The model around these parameters of its UNet."""
        texts = {name: self.parts[name] for name in self.structure.text}
        return Components(
            description=self.description,
            unet_config=self.structure.unet,
            vae_config=self.structure.vae,
            unet=self.unet,
            vae=self.parts["vae"],
            text_encoders=texts,
            text_lengths={name: config.max_position_embeddings for name, config in self.structure.text.items()},
            params={"unet": params},
            is_xl=self.description.is_xl,
            zero_unconditional=self.description.is_xl,
        )

    @property
    def base(self) -> StableDiffusion:
        """The model as the stages and the pipeline see it."""
        return StableDiffusion(components=self.components({}), dtype=DTYPE, mesh=self.mesh)
