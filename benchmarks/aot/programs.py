"""The programs that are compiled: each by name, traced from shapes for a number of rows on every chip."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.aot.model import DTYPE, PIXELS_PER_LATENT, AbstractModel
from benchmarks.sides import training, training_ours
from hypersd_jax import adapters
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.diffusion import solver_table
from hypersd_jax.diffusion.sampling import State
from hypersd_jax.inputs.encoding import make_encoder
from hypersd_jax.pipeline.programs import Guides, compile_programs
from hypersd_jax.training import abstract, batch_sharding
from hypersd_jax.weights.placement import leaf_sharding

Lowered = jax.stages.Lowered
RANK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Shapes of a batch on the mesh.

    Attributes:
        model: whose inputs they are.
        latent: side of the latents.
        rows: samples of a micro-batch, on all chips together.
        accumulate: micro-batches of a training step.
    """

    model: AbstractModel
    latent: int
    rows: int
    accumulate: int = 1

    def array(self, *shape: int, dtype: Any = jnp.float32, axis: int = 0) -> jax.ShapeDtypeStruct:
        """A batch's array, split along ``axis`` where it divides evenly."""
        mesh = self.model.mesh
        if shape[axis] % mesh.size:
            return jax.ShapeDtypeStruct(shape, dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, axis))

    def conditioning(self, *lead: int, axis: int = 0) -> Conditioning:
        """Text embeddings, SDXL's with pooled text and sizes."""
        config = self.model.structure.unet
        context = self.array(*lead, training.TOKENS, config.cross_attention_dim, dtype=DTYPE, axis=axis)
        if not config.text_time:
            return Conditioning(context)
        pooled = self.array(*lead, config.pooled_dim, dtype=DTYPE, axis=axis)
        return Conditioning(context, pooled, self.array(*lead, 6, axis=axis))

    def adapter(self) -> dict[str, Any]:
        """A LoRA on the UNet."""
        whole = jax.eval_shape(lambda: adapters.init(jax.random.key(0), self.model.unet.shapes, rank=RANK))
        mesh = self.model.mesh
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf_sharding(mesh, leaf.shape, leaf.dtype)
            ),
            whole,
        )


def unet(given: Inputs) -> Lowered:
    """One call of the UNet without a LoRA."""
    base, side = given.model.base, given.latent
    call = jax.jit(lambda params, x, t, cond: base.predict(params, x, t, cond)[0])
    x = given.array(given.rows, side, side, 4, dtype=DTYPE)
    times = given.array(given.rows, dtype=jnp.int32)
    return call.lower(given.model.shapes("unet"), x, times, given.conditioning(given.rows))


def encode(given: Inputs) -> Lowered:
    """Images and captions to latents and conditioning, as every training step without a cache begins."""
    model, pixels, many = given.model, given.latent * PIXELS_PER_LATENT, (given.accumulate, given.rows)
    program = make_encoder(model.base, batch_sharding(model.mesh, 1))
    texts = {name: model.shapes(name) for name in model.structure.text}
    ids = tuple(given.array(*many, training.TOKENS, dtype=jnp.int32, axis=1) for _ in texts)
    sizes = given.array(*many, 6, axis=1) if model.base.reads_size else None
    images = given.array(*many, pixels, pixels, 3, dtype=jnp.uint8, axis=1)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return program.lower(texts, model.shapes("vae"), images, ids, sizes, key)


def text(given: Inputs) -> Lowered:
    """Prompts to conditioning, as sampling begins."""
    texts = {name: given.model.shapes(name) for name in given.model.structure.text}
    ids = tuple(given.array(given.rows, training.TOKENS, dtype=jnp.int32) for _ in texts)
    return compile_programs(given.model.base).encode_prompts.lower(texts, ids, {})  # type: ignore[attr-defined]


def decode(given: Inputs) -> Lowered:
    """Latents to images."""
    program = compile_programs(given.model.base).decode
    latents = given.array(given.rows, given.latent, given.latent, 4)
    return program.lower(given.model.shapes("vae"), latents, tiled=False)


def sampler(steps: int) -> Callable[[Inputs], Lowered]:
    """A solver's scan under a LoRA, without guidance."""

    def lower(given: Inputs) -> Lowered:
        base = given.model.base
        config = dict(base.scheduler_config)
        table = solver_table("tcd", steps, eta=0.3, spacing=None, scheduler_config=config)
        shapes = {key: jax.ShapeDtypeStruct(np.shape(value), np.asarray(value).dtype) for key, value in table.items()}
        x = given.array(given.rows, given.latent, given.latent, 4)
        noise = given.array(steps, given.rows, given.latent, given.latent, 4, axis=1)
        return compile_programs(base).scan.lower(  # type: ignore[attr-defined]
            given.model.shapes("unet"),
            given.adapter(),
            given.conditioning(given.rows),
            None,
            jnp.float32(0),
            shapes,
            State(x, x),
            noise,
            Guides(),
            (),
            (),
            controlnets=(),
            prompted_only=False,
            prediction_type="epsilon",
        )

    return lower


def stage(case: str, **changes: Any) -> Callable[[Inputs], Lowered]:
    """A training step of one of `training.CASES`."""

    def lower(given: Inputs) -> Lowered:
        model, many = given.model, (given.accumulate, given.rows)
        found = training.find_case(case, training.FAKE_UPDATES)
        settings = {**found.stage, **changes, "batch_size": given.accumulate * given.rows}
        found = dataclasses.replace(found, stage={**settings, "accumulate": given.accumulate})
        values = training_ours.given(model.structure.unet, given.latent)
        start, scales = jax.eval_shape(
            lambda: adapters.split(adapters.init(jax.random.key(0), model.unet.shapes, rank=RANK))
        )
        shape = training.Shape(latent=given.latent, rank=RANK)

        def trees(params: Any, start: Any, scales: Any) -> Any:
            run = training_ours.make_run(shape, found, model, params, values, scales, start)  # type: ignore[arg-type]
            runs.append(run)
            return training_ours.trees(run)

        runs: list[Any] = []
        state, frozen = jax.eval_shape(trees, model.shapes("unet"), start, scales)
        run, own = runs[0], runs[0].config.stages[training_ours.INDEX]
        batch: dict[str, Any] = {
            "cond": given.conditioning(*many, axis=1),
            "indices": given.array(*many, dtype=jnp.int32, axis=1),
        }
        if own.reads_images:
            batch["latents"] = given.array(*many, given.latent, given.latent, 4, axis=1)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return run.step.lower(abstract(model.mesh, state), abstract(model.mesh, frozen), batch, key, own)

    return lower


PROGRAMS: dict[str, Callable[[Inputs], Lowered]] = {
    "unet": unet,
    "encode": encode,
    "text": text,
    "decode": decode,
    "sampler-1": sampler(1),
    "sampler-4": sampler(4),
    **{case: stage(case) for case in training.CASES},
}
"""By name; the stages are those of `training_step.py`."""
