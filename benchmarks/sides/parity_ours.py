"""This package's side: ``python -m benchmarks.sides.parity_ours FAMILY MODEL FOLDER``.

One component is in memory at a time, but for the images, which the pipeline samples.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sides import parity
from hypersd_jax.adapters import join, split
from hypersd_jax.conditioning import PromptEncoder, load_tokenizer
from hypersd_jax.models import Network, Params
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights import read_lora
from hypersd_jax.weights.assembly import Structure, networks, parse
from hypersd_jax.weights.components import open_model

Arrays = Mapping[str, np.ndarray]


class Model:
    """The networks of a folder, and the parameters of one component at a time."""

    def __init__(self, folder: Path) -> None:
        self._stored = open_model(folder)
        self.structure: Structure = parse(self._stored.description)
        self._dtypes = dict.fromkeys(self.structure.components, jnp.float32)
        self.networks: dict[str, Network] = networks(self.structure, self._dtypes, remat=True)

    def prompts(self) -> PromptEncoder:
        """The encoder that turns prompts into token ids."""
        texts, files = self.structure.text, self._stored.description.tokenizers
        return PromptEncoder(
            names=tuple(texts),
            tokenizers=tuple(load_tokenizer(files[name.replace("text_encoder", "tokenizer")]) for name in texts),
            networks=tuple(self.networks[name] for name in texts),
            lengths=tuple(config.max_position_embeddings for config in texts.values()),
            penultimate=len(texts) == 2,
        )

    def params(self, name: str) -> Params:
        """Read one component."""
        read = self._stored.read({name: self.networks[name].shapes}, self._dtypes)
        return {path: jax.device_put(array) for path, array in read[name]}


def text(model: Model, given: Arrays, record: parity.Record) -> None:
    prompts = model.prompts()
    for name, tokens in zip(prompts.names, prompts.tokenize(parity.PROMPTS), strict=True):
        ids = np.concatenate([tokens, given["ids"]])
        record.keep(f"{name}.ids", ids)
        for part, value in jax.jit(model.networks[name])(model.params(name), ids)._asdict().items():
            record.keep(f"{name}.{part}", value)


def autoencoder(model: Model, given: Arrays, record: parity.Record) -> None:
    network, params = model.networks["vae"], model.params("vae")
    mean, logvar = jax.jit(partial(network, method="encode"))(params, given["image"])
    record.keep("vae.mean", mean)
    record.keep("vae.logvar", logvar)

    def total(latents: jax.Array, params: Params, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        decoded = network(params, latents, method="decode")
        return jnp.sum(decoded * weights), decoded

    gradient, decoded = jax.jit(jax.grad(total, has_aux=True))(given["latents"], params, given["image_weights"])
    record.keep("vae.decoded", decoded)
    record.keep("vae.decoded: d latents", gradient)


def denoiser(model: Model, given: Arrays, adapter_file: Path, record: parity.Record) -> None:
    """The bare UNet's value, then value and gradients with the adapter that PEFT made."""
    network, params = model.networks["unet"], model.params("unet")
    timesteps = np.asarray([parity.TIMESTEP])
    leaves = {name: given[name] for name in ("latents", "context", "pooled") if name in given}
    time_ids = given.get("time_ids")

    def call(params: Params, leaves: Mapping[str, jax.Array], adapter: Any = None) -> jax.Array:
        latents, context = leaves["latents"], leaves["context"]
        added = {"pooled": leaves["pooled"], "time_ids": jnp.asarray(time_ids)} if "pooled" in leaves else {}
        return network(params, latents, timesteps, context, adapter=adapter, **added)

    record.keep("unet", jax.jit(call)(params, leaves))
    factors, scales = split(read_lora(adapter_file, {"unet": network.shapes}).adapters["unet"])

    def total(differentiated: tuple[Any, Any], params: Params, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        leaves, factors = differentiated
        output = call(params, leaves, join(factors, scales))
        return jnp.sum(output * weights), output

    program = jax.jit(jax.grad(total, has_aux=True))
    (d_leaves, d_factors), output = program((leaves, factors), params, given["weights"])
    record.keep("unet+lora", output)
    for name, gradient in d_leaves.items():
        record.keep(f"unet+lora: d {name}", gradient)
    for module, pair in d_factors.items():
        for name, gradient in pair.items():
            record.keep(f"unet+lora: d {module}.{name}", gradient)


def pipeline_images(folder: Path, given: Arrays, adapter_file: Path, record: parity.Record) -> None:
    pipe = Pipeline.from_pretrained(folder, dtype="float32")
    pipe.load_lora(adapter_file)
    for steps in parity.STEPS:
        sample = partial(
            pipe,
            parity.PROMPTS[0],
            steps=steps,
            sampler="ddim",
            guidance=0.0,
            latents=given["latents"],
            height=parity.PIXELS,
            width=parity.PIXELS,
        )
        record.keep(f"{steps}-step pipeline: latents", sample(output="latent"))
        record.keep(f"{steps}-step pipeline: image", 2 * sample(output="np") - 1)


def main() -> None:
    family, path, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    given, record = parity.inputs(family), parity.Record("ours", folder)
    adapter_file = folder / "adapter.safetensors"
    model = Model(path)
    with record.part("text"):
        text(model, given, record)
    gc.collect()
    with record.part("vae"):
        autoencoder(model, given, record)
    gc.collect()
    with record.part("unet"):
        denoiser(model, given, adapter_file, record)
    jax.clear_caches()
    gc.collect()
    with record.part("images"):
        pipeline_images(path, given, adapter_file, record)
    record.write()


if __name__ == "__main__":
    main()
