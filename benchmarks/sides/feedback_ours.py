"""This package's side: ``python -m benchmarks.sides.feedback_ours MODEL REWARD PIXELS UPDATES EXCHANGE``.

The feedback stage's own step on random noise and conditioning: student, decoder (its activations computed again),
reward, their gradient and the second LoRA's update.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sides import feedback, training
from benchmarks.sides.training_ours import INDEX, part_trained
from hypersd_jax import adapters
from hypersd_jax.bases import load_base
from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import Config, build
from hypersd_jax.distill import draw_trajectory
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import STUDENT, kind_of, training_step
from hypersd_jax.stages.rewards import TOKENS
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import StopSignals, batch_sharding, init_state, make_mesh, put_batch
from hypersd_jax.weights import write_lora


def make_run(model: Path, reward: Path, pixels: int, mesh: Any) -> Run:
    """Make the stage's run, without data or output, on a random distilled student."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    base = load_base(model, dtype=dtype, mesh=mesh, resolution=pixels, remat=True)
    rewards = [{**feedback.REWARD, "path": str(reward)}]
    stages = [
        {"name": "before", **training.TSCD},
        {**feedback.STAGE, "feedback": {"rewards": rewards, "balanced": False, "guards": None}},
    ]
    config = build(Config, {"output_dir": "nowhere", "lora": {"rank": feedback.RANK}, "stages": stages})
    factors, scales = part_trained(stream(0, Stream.ADAPTER, 0), base.shapes["unet"], feedback.RANK)
    return Run(
        config=config,
        output=None,
        mesh=mesh,
        base=base,
        base_fingerprint="",
        preview_prompts=(),
        uncond=None,
        source=None,
        prompt_inputs=None,
        step=training_step(base, mesh),
        stop=StopSignals(),
        scales=scales,
        fresh_scales=scales,
        student=factors,
    )


def load() -> training.Loaded:
    model, reward, pixels, updates, exchange = sys.argv[1:]
    use_compilation_cache()
    mesh = make_mesh(1, 1)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    baseline = training.resident() if on_cpu else 0.0
    run = make_run(Path(model), Path(reward), int(pixels), mesh)
    stage, base = run.config.stages[INDEX], run.base
    kind = kind_of(stage)
    trained = kind.trainable(run, INDEX, stage)
    second, _ = part_trained(stream(1, Stream.FEEDBACK, 0), base.shapes["unet"], feedback.FEEDBACK_RANK)
    state, frozen = init_state({**trained, STUDENT: second}, stage, averaged=(STUDENT,)), kind.frozen(run, stage)
    random = np.random.default_rng(0)
    context = random.standard_normal((1, training.TOKENS, base.components.unet_config.cross_attention_dim), np.float32)
    batch = {
        "cond": Conditioning(jnp.asarray(context, base.dtype), None, None),
        "indices": np.zeros(1, np.int32),
        "latents": np.zeros((1, *base.latent_shape), np.float32),
        TOKENS: (np.zeros((1, 0), np.int32),),
    }
    batch = put_batch(jax.tree.map(lambda leaf: leaf[None], batch), batch_sharding(mesh, axis=1))
    key = stream(run.config.seed, Stream.NOISE, INDEX)

    def drawn(number: int) -> np.ndarray:
        step = jax.random.fold_in(key, number)  # of a step with one phase
        return np.asarray(draw_trajectory(step, (1, *base.latent_shape), 1, np.zeros(1, np.int32)).noise)

    folder = Path(exchange)
    np.savez(folder / feedback.GIVEN, context=context, noise=np.stack([drawn(n) for n in range(int(updates))]))
    write_lora(folder / feedback.DISTILLED, {"unet": adapters.join(run.student, run.scales)}, layout="peft")
    ones = {path: jnp.ones(feedback.FEEDBACK_RANK) for path in second}
    write_lora(folder / feedback.SECOND, {"unet": adapters.join(second, ones)}, layout="peft")

    begin = time.perf_counter()
    step = run.step.lower(state, frozen, batch, key, stage).compile()
    plan = step.memory_analysis()
    about = {
        "platform": "cpu" if on_cpu else "gpu",
        "dtype": str(jnp.dtype(base.dtype)),
        "device": str(mesh.devices.flat[0].device_kind),
        "compile seconds": time.perf_counter() - begin,
        "XLA temporary GiB": plan.temp_size_in_bytes / training.GIB,
    }
    held = SimpleNamespace(state=state)
    del state
    gc.collect()

    def update() -> dict[str, float]:
        held.state, metrics = step(held.state, frozen, batch, key, stage)
        found = {name: float(value) for name, value in jax.device_get(metrics).items()}
        jax.block_until_ready(held.state)
        return {"loss": found["loss"], "grad_norm": found["grad_norm"], "reward": found["reward"]}

    return training.Loaded(update=update, baseline=baseline, about=about)


if __name__ == "__main__":
    training.serve(load)
