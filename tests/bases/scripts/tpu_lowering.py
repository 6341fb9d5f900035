"""Lower what runs around a training step for four by two TPU chips; a process of its own, with eight fake devices.

Prints, of each program, how many TPU kernels it holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp

from hypersd_jax.bases import load_base
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.inputs.encoding import make_encoder
from hypersd_jax.models.autoencoder import read_vae_config, vae_network
from hypersd_jax.models.execution import Execution
from hypersd_jax.pipeline.programs import compile_programs
from hypersd_jax.training import batch_sharding, make_mesh
from hypersd_jax.weights.diffusers.component import save_params
from tests.helpers.tiny_model import VAE, tiny_model

PIXELS, LATENT, ROWS = 64, 32, 8  # 1,024 tokens, from which a TPU's kernel attends


def attending(folder: Path) -> Path:
    """A tiny model whose autoencoder attends, too."""
    tiny_model(folder)
    config = {**VAE, "mid_block_add_attention": True}
    save_params(
        folder / "vae",
        vae_network(read_vae_config(config), dtype=jnp.float32).init(0),
        config=config,
        component_kind="vae",
    )
    return folder


def main() -> None:
    """Trace as on a TPU host, whose mesh says so."""
    Execution.platform = property(lambda _: "tpu")  # type: ignore[assignment]
    mesh = make_mesh(4, 2)
    base = load_base(attending(Path(sys.argv[1])), dtype=jnp.bfloat16, mesh=mesh, resolution=PIXELS)
    programs = compile_programs(base)

    def batch(*shape: int, dtype: Any = jnp.float32, axis: int = 0) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, axis))

    text = {name: base.params[name] for name in base.text_encoders}
    tokens = batch(2, ROWS, 24, dtype=jnp.int32, axis=1)
    latents, times = batch(ROWS, LATENT, LATENT, 4), batch(ROWS, dtype=jnp.int32)
    cond = Conditioning(batch(ROWS, 24, 16, dtype=jnp.bfloat16))
    encode = make_encoder(base, batch_sharding(mesh, axis=1))
    images = batch(2, ROWS, PIXELS, PIXELS, 3, dtype=jnp.uint8, axis=1)
    autoencoder = base.params[base.autoencoder]
    traced = {
        "encode": encode.trace(text, autoencoder, images, (tokens,), None, jax.random.key(0)),
        "decode": programs.decode.trace(autoencoder, latents, tiled=False),
        "predict": programs.predict.trace(base.params[base.denoiser], {}, cond, cond, 2.0, latents, times),
    }
    lowered = {name: each.lower(lowering_platforms=("tpu",)).as_text() for name, each in traced.items()}
    print(json.dumps({name: text.count("@tpu_custom_call") for name, text in lowered.items()}))


if __name__ == "__main__":
    main()
