"""This package's side: ``python -m benchmarks.sides.training_ours MODEL SHAPE CASE LATENT REMAT UPDATES EXCHANGE``.

The stage's own step (`stages.kinds.training_step`) on random latents and conditioning; of the model only the UNet is
read.
The step is compiled from shapes alone, and nothing is read where XLA's plan says that it would not fit in memory.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.sides import training
from hypersd_jax import adapters
from hypersd_jax.bases import StableDiffusion
from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.conditioning import Conditioning, size_ids
from hypersd_jax.config import Config, build
from hypersd_jax.distill import Segments, draw, draw_trajectory
from hypersd_jax.models.functional import Network, Shapes
from hypersd_jax.models.unet import UNetConfig
from hypersd_jax.stages.context import Factors, Run
from hypersd_jax.stages.kinds import STUDENT, kind_of, training_step
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import StopSignals, TrainState, abstract, batch_sharding, init_state, make_mesh, put_batch
from hypersd_jax.weights import write_lora
from hypersd_jax.weights.assembly import Components, StoredModel, Structure, networks, parse
from hypersd_jax.weights.components import default_dtype, open_model
from hypersd_jax.weights.placement import leaf_sharding

PIXELS_PER_LATENT = 8
# The step before which the run stands; 0 would be a stage without a student before it.
INDEX = 1
MOST_OF_MEMORY = 0.9
"""What XLA's plan may take of the memory that is free; the kernels' own buffers are not in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A stored model of which only the UNet is ever read."""

    stored: StoredModel
    structure: Structure
    unet: Network
    mesh: Mesh

    @classmethod
    def describe(cls, stored: StoredModel, *, remat: bool, mesh: Mesh) -> Model:
        """Describe it, and read nothing."""
        structure = parse(stored.description)
        dtypes = dict.fromkeys(structure.components, default_dtype())
        unet = networks(structure, dtypes, remat=remat, mesh=mesh)["unet"]
        return cls(stored=stored, structure=structure, unet=unet, mesh=mesh)

    def read(self) -> dict[str, jax.Array]:
        """The UNet's parameters, placed."""
        shapes = self.unet.shapes
        read = self.stored.read({"unet": shapes}, {"unet": default_dtype()})["unet"]
        placed = {
            name: jax.device_put(array, leaf_sharding(self.mesh, array.shape, array.dtype)) for name, array in read
        }
        return {name: placed[name] for name in shapes}

    def components(self, params: Mapping[str, Any]) -> Components:
        """The model around these parameters of its UNet."""
        return Components(
            description=self.stored.description,
            unet_config=self.structure.unet,
            vae_config=self.structure.vae,
            unet=self.unet,
            vae=None,
            text_encoders={},
            text_lengths={},
            params={"unet": params},
            is_xl=self.stored.description.is_xl,
            zero_unconditional=False,
        )


def given(config: UNetConfig, latent: int, batch: int = 1) -> dict[str, np.ndarray]:
    """Latents and conditioning of a batch, and the unconditional; standard normal."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    found = {
        "latents": normal(batch, latent, latent, config.in_channels),
        "context": normal(batch, training.TOKENS, config.cross_attention_dim),
        "uncond_context": normal(1, training.TOKENS, config.cross_attention_dim),
    }
    if config.text_time:
        pixels = latent * PIXELS_PER_LATENT
        found |= {"pooled": normal(batch, config.pooled_dim), "uncond_pooled": normal(1, config.pooled_dim)}
        found["time_ids"] = size_ids(pixels, pixels, batch)
    return found


def part_trained(key: jax.Array, shapes: Shapes, rank: int) -> tuple[Factors, dict[str, jax.Array]]:
    """(factors, scales) of a LoRA that is nowhere zero, so that all of its gradient is there."""
    factors, scales = adapters.split(adapters.init(key, shapes, rank=rank))
    random = np.random.default_rng(1)
    bound = 0.1 * rank**-0.5
    for pair in factors.values():
        pair["up"] = jnp.asarray(random.uniform(-bound, bound, pair["up"].shape), jnp.float32)
    return factors, scales


def make_run(
    shape: training.Shape,
    case: training.Case,
    model: Model,
    params: Mapping[str, Any],
    values: Any,
    scales: Any,
    student: Factors,
) -> Run:
    """Make a stage's run, without data or output; a stage stands before it, as a teacher may."""
    components = model.components(params)
    stages = [{"name": "before", **training.TSCD}, {"name": "timed", **case.stage}]
    config = build(Config, {"output_dir": "nowhere", "lora": {"rank": shape.rank}, "stages": stages})
    dtype = default_dtype()
    pixels = values["latents"].shape[1] * components.vae_config.downscale
    base = StableDiffusion(components=components, resolution=pixels, dtype=dtype, mesh=model.mesh)
    uncond = (jnp.asarray(values[name], dtype) for name in ("uncond_context", "uncond_pooled") if name in values)
    return Run(
        config=config,
        output=None,
        mesh=model.mesh,
        base=base,
        base_fingerprint="",
        preview_prompts=(),
        uncond=Conditioning(*uncond),
        source=None,
        prompt_inputs=None,
        step=training_step(base, model.mesh),
        stop=StopSignals(),
        scales=scales,
        fresh_scales=scales,
        student=student,
    )


def make_batch(run: Run, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """The step's batch, one micro-batch."""
    dtype = default_dtype()
    cond = Conditioning(
        jnp.asarray(values["context"], dtype),
        jnp.asarray(values["pooled"], dtype) if "pooled" in values else None,
        values.get("time_ids"),
    )
    batch = {"cond": cond, "indices": np.arange(len(values["latents"]), dtype=np.int32), "latents": values["latents"]}
    if not run.config.stages[INDEX].reads_images:
        del batch["latents"]
    return put_batch(jax.tree.map(lambda leaf: leaf[None], batch), batch_sharding(run.mesh, axis=1))


def trees(run: Run) -> tuple[TrainState, Any]:
    """The stage's state before the first update, and its frozen arrays."""
    stage = run.config.stages[INDEX]
    kind = kind_of(stage)
    return init_state(kind.trainable(run, INDEX, stage), stage, averaged=(STUDENT,)), kind.frozen(run, stage)


def leave_for_theirs(
    folder: Path, run: Run, segments: Segments, values: dict[str, np.ndarray], key: jax.Array, updates: int
) -> None:
    """Write the inputs, what every update draws, and the student's first LoRA."""
    guidance, shape = run.config.stages[INDEX].guidance, values["latents"].shape
    one = jax.jit(lambda step: draw(jax.random.fold_in(key, step), shape, segments, guidance=guidance))
    drawn = [one(step)._asdict() for step in range(updates)]
    draws = {name: np.stack([each[name] for each in drawn]) for name in drawn[0]}
    np.savez(folder / training.GIVEN, **values, **draws)
    write_lora(folder / training.ADAPTER, {"unet": adapters.join(run.student, run.scales)}, layout="peft")


def least_calls(case: training.Case, key: jax.Array, step: int) -> float:
    """The fewest calls of this update, given how many earlier steps of the student its phases have drawn.

    As the metrics do, the last repetition stands for all of a phase's.
    """
    count = len(case.stage.get("times", [0]))
    found = 0.0
    for index, phase in enumerate(reversed(case.phases)):
        here = jax.random.fold_in(jax.random.fold_in(key, step), index)
        drawn = draw_trajectory(jax.random.fold_in(here, phase.times - 1), (1, 1, 1, 1), count)
        found += phase.least(int(drawn.step))
    return found


def counted_calls(metrics: dict[str, float]) -> float:
    """Sum the calls that the step itself has counted."""
    return metrics["calls"] + metrics.get("fake_calls", 0.0) + metrics.get("discriminator_calls", 0.0)


def device_peak(device: jax.Device) -> float:
    """Peak of an accelerator's memory, GiB."""
    stats = device.memory_stats() or {}
    return stats["peak_bytes_in_use"] / training.GIB


def tree_bytes(tree: Any) -> int:
    """Size of all arrays of a tree, or of their shapes, in bytes."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def available(device: jax.Device) -> float:
    """The memory that a step may take, bytes; on a CPU with what is free of swap, where it is far slower."""
    if device.platform != "cpu":
        return (device.memory_stats() or {})["bytes_limit"]
    return training.status_bytes("/proc/meminfo", "MemAvailable") + training.status_bytes("/proc/meminfo", "SwapFree")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A step that was compiled from shapes, and what it will need."""

    step: Any
    lowering: float
    seconds: dict[str, float]
    kept: bool
    sizes: dict[str, int]

    @classmethod
    def compile(cls, run: Run, start: Factors, batch: Any, key: jax.Array) -> Planned:
        """``run``: its UNet's parameters are shapes."""
        events: list[str] = []
        jax.monitoring.register_event_listener(lambda name, **_: events.append(name))

        def within(params: Mapping[str, jax.Array], start: Factors) -> Any:
            base = run.base.around(dataclasses.replace(run.base.components, params={"unet": params}))
            return trees(dataclasses.replace(run, base=base, student=start))

        found = jax.eval_shape(within, run.base.weights, start)
        state, frozen = (abstract(run.mesh, tree) for tree in found)
        stage = run.config.stages[INDEX]
        lowering = training.cpu_seconds()
        lowered = run.step.lower(state, frozen, batch, key, stage)
        events.clear()
        begin = {"wall": time.perf_counter(), "CPU": training.cpu_seconds()}
        step = lowered.compile()
        seconds = {"wall": time.perf_counter() - begin["wall"], "CPU": training.cpu_seconds() - begin["CPU"]}
        sizes = {
            "trainable": tree_bytes(state.trainable),
            "optimizer": tree_bytes(state.opt_state),
            "average": tree_bytes(state.ema),
            "frozen": tree_bytes(frozen),
        }
        return cls(
            step=step,
            lowering=begin["CPU"] - lowering,
            seconds=seconds,
            kept="/jax/compilation_cache/cache_hits" in events,
            sizes=sizes,
        )

    @property
    def memory(self) -> dict[str, int]:
        """XLA's plan, bytes; outputs that take an argument's place are not counted again."""
        plan = self.step.memory_analysis()
        return {
            "arguments": plan.argument_size_in_bytes,
            "temporary": plan.temp_size_in_bytes,
            "new outputs": plan.output_size_in_bytes - plan.alias_size_in_bytes,
        }

    @property
    def kernels(self) -> int:
        """Number of kernels that XLA has generated, which is what compiling on a CPU takes its time for."""
        return sum(line.count(" fusion(") for line in self.step.as_text().splitlines())


def load() -> training.Loaded:
    folder, shape_name, name, fake_updates, latent, remat, updates, exchange = sys.argv[1:]
    if updates == training.COMPILE_ONLY:
        jax.config.update("jax_enable_compilation_cache", False)
    else:
        use_compilation_cache()
    shape, case = training.SHAPES[shape_name], training.find_case(name, int(fake_updates))
    mesh = make_mesh(1, 1)
    device = mesh.devices.flat[0]
    on_cpu = device.platform == "cpu"
    baseline = training.resident() if on_cpu else 0.0

    model = Model.describe(open_model(Path(folder)), remat=remat == "remat", mesh=mesh)
    shapes = model.unet.shapes
    values = given(model.structure.unet, int(latent))
    start, scales = part_trained(stream(0, Stream.ADAPTER, 0), shapes, shape.rank)
    run = make_run(shape, case, model, shapes, values, scales, start)
    key, batch = stream(run.config.seed, Stream.NOISE, INDEX), make_batch(run, values)
    planned = Planned.compile(run, start, batch, key)
    about = {
        "device": str(device.device_kind),
        "platform": device.platform,
        "dtype": str(jnp.dtype(default_dtype())),
        "lowering CPU seconds": planned.lowering,
        "compile seconds": planned.seconds["wall"],
        "compile CPU seconds": planned.seconds["CPU"],
        "compiled before": planned.kept,
        "kernels": planned.kernels,
        "bytes": planned.sizes,
        "XLA GiB": {name: size / training.GIB for name, size in planned.memory.items()},
    }
    if updates == training.COMPILE_ONLY or sum(planned.memory.values()) > MOST_OF_MEMORY * available(device):
        return training.Loaded(update=None, baseline=baseline, about=about)

    run = make_run(shape, case, model, model.read(), values, scales, start)
    state, frozen = trees(run)
    stage = run.config.stages[INDEX]
    if name == training.COMPARED:
        leave_for_theirs(Path(exchange), run, frozen.segments, values, key, int(updates))
    held, least = [state], iter([least_calls(case, key, number) for number in range(int(updates))])
    gc.collect()

    def update() -> dict[str, float]:
        state, found = planned.step(held.pop(), frozen, batch, key, stage)
        held.append(jax.block_until_ready(state))
        metrics = {name: float(value) for name, value in jax.device_get(found).items()}
        return {
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "calls": counted_calls(metrics),
            "minimum": next(least),
        }

    return training.Loaded(
        update=update,
        baseline=baseline,
        about=about,
        peak=training.resident_peak if on_cpu else partial(device_peak, device),
    )


if __name__ == "__main__":
    training.serve(load)
