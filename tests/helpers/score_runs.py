"""Stages of several players on a tiny model: opened, stepped by hand, their parts by NumPy and direct UNet calls."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypersd_jax import adapters
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import Config, load_config
from hypersd_jax.distill import METHODS, Draw, draw
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.stages import run as stage_run
from hypersd_jax.stages.jobs import Job, Run, fresh_factors, make_job
from hypersd_jax.stages.judging import Judge
from hypersd_jax.stages.loop import ADAPTER_STREAM, NOISE_STREAM, stream
from hypersd_jax.stages.networks import broadcast
from hypersd_jax.stages.output import create_output, open_output
from hypersd_jax.stages.tscd import segments_of
from hypersd_jax.training import Controls, Turn
from hypersd_jax.weights.components import Components
from hypersd_jax.weights.diffusers.component import save_params
from tests.helpers import tiny_model as tiny
from tests.helpers.quick import quick_jit

RECIPE = """
output_dir: {output}
model: {model}
data: {{source: {source}, resolution: 16}}
lora: {{rank: 4}}
log: {{checkpoint_every: 2, tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
{stages}
"""
TOLERANCE = 1e-4
"""Relative, of a float32 number that two programs compute."""
MIDDLE = "mid_block"


def smaller(folder: Path) -> Path:
    """A tiny model with a UNet of one level: a round holds a dozen of them, which compile in half the time.

    Its weights are larger, so that prompts matter more.
    """
    name = folder / "unet" / "config.json"
    config = {
        **json.loads(name.read_text()),
        "block_out_channels": [16],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
    }
    network = unet(UNetConfig.from_dict(config), dtype=jnp.float32)
    for old in name.parent.glob("*"):
        old.unlink()
    save_params(name.parent, network.init(0, gain=2.0), config=config, component_kind="unet")
    return folder


def recipe(folder: Path, model: Path, stages: str, *overrides: str, source: str = "emoji") -> Config:
    """The configuration of a run whose output is folder/out."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(output=folder / "out", model=model, source=source, stages=stages))
    return load_config(path, overrides)


class Round(NamedTuple):
    """A round: the host's copy of the state before and after, and what it logged."""

    before: Any
    after: Any
    metrics: dict[str, float]

    def gradient(self, player: str, *, clip_norm: float, beta1: float) -> Any:
        """The gradient that a player's first update took, read back from Adam's first moment."""
        moment = optax.tree.get(self.after.opt_state[player], "mu")
        norm = self.metrics.get(f"{player}_grad_norm", self.metrics["grad_norm"])
        return jax.tree.map(lambda leaf: np.asarray(leaf) / (1 - beta1) * max(1.0, norm / clip_norm), moment)


@dataclasses.dataclass(kw_only=True)
class Opened:
    """The only stage of a run, ready for its first round, with what stages before it would have left."""

    run: Run
    stage: Any
    start: Any
    students: dict[str, Any]

    @functools.cached_property
    def job(self) -> Job:
        return make_job(self.run, 0, self.stage, self.start, self.students)

    @functools.cached_property
    def rows(self) -> dict[str, Any]:
        """The first batch, without the axis of micro-batches."""
        _, batch, _ = next(stage_run._batches(self.run, 0, self.stage, 0))
        return jax.tree.map(lambda leaf: leaf[0], batch)

    def key(self, turn: int, repeat: int = 0) -> jax.Array:
        """What this turn of the first round draws from."""
        key = stream(self.run.config.seed, NOISE_STREAM, 0)
        for number in (0, turn, repeat):
            key = jax.random.fold_in(key, number)
        return key

    def round(self, **changed: float) -> Round:
        """The first round, with some of the stage's controls changed."""
        job = make_job(self.run, 0, self.stage, self.start, self.students)
        before = jax.device_get(job.state)
        batch = jax.tree.map(lambda leaf: leaf[None], self.rows)
        controls = {**job.controls, **{name: np.float32(value) for name, value in changed.items()}}
        key = stream(self.run.config.seed, NOISE_STREAM, 0)
        after, metrics = job.make()(job.state, job.frozen, batch, key, controls)
        found = {name: float(value) for name, value in metrics.items()}
        return Round(before, jax.device_get(after), found)


def open_stage(config: Config, *before: str) -> Opened:
    """Open the only stage of a run, after stages of these names: random students, from the last of whom it starts."""
    output = open_output(config)
    run = stage_run.open_run(config, output)
    create_output(output, config)
    fresh, run.scales = fresh_factors(run, ADAPTER_STREAM, 0)
    students = {name: randomised(fresh, seed) for seed, name in enumerate(before)}
    (stage,) = config.adapter_stages
    return Opened(run=run, stage=stage, start=students[before[-1]] if before else fresh, students=students)


def randomised(tree: Any, seed: int, scale: float = 0.05) -> Any:
    """The tree with noise added to every leaf."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + np.float32(scale) * random.standard_normal(leaf.shape, np.float32), tree)


class ByHand:
    """The networks of a stage called directly, and the arithmetic of its losses in NumPy, float64."""

    def __init__(self, opened: Opened, taps: Sequence[str] = ()) -> None:
        self.opened, self.run, self.taps = opened, opened.run, tuple(taps)
        self.rows = jax.tree.map(np.asarray, opened.rows)
        self.cond: Conditioning = opened.rows["cond"]
        self.uncond = broadcast(self.run.uncond, self.cond)
        betas = np.linspace(tiny.SCHEDULER["beta_start"] ** 0.5, tiny.SCHEDULER["beta_end"] ** 0.5, 1000) ** 2
        self.abar = np.cumprod(1 - betas)
        self.none = self.adapter(jax.tree.map(jnp.zeros_like, opened.start))
        network = self.run.pipe.components.unet

        def call(params: Any, x: Any, t: Any, cond: Conditioning, adapter: Any) -> Any:
            found = network(params, x, t, cond.context, adapter=adapter, taps=self.taps, **cond.unet_kwargs())
            return found if taps else (found, {})

        self._call = quick_jit(call)

    def adapter(self, factors: Any) -> Any:
        """Factors with the run's scales."""
        return adapters.join(factors, self.run.scales)

    def unet(
        self, x: Any, t: Any, adapter: Any = None, cond: Conditioning | None = None, params: Any = None
    ) -> tuple[np.ndarray, dict[str, jax.Array]]:
        """The predicted noise (B, h, w, C) float64 at times (B,), and the features of the taps."""
        weights = dict(self.run.pipe.components.params["unet"]) if params is None else params
        cond = self.cond if cond is None else cond
        t = np.broadcast_to(np.asarray(t, np.int32), (len(x),))
        eps, found = self._call(weights, jnp.asarray(x, jnp.float32), t, cond, adapter or self.none)
        return np.asarray(eps, np.float64), found

    def guided(self, x: Any, t: Any, guidance: Any) -> np.ndarray:
        """The base's prediction with classifier-free guidance, in two calls."""
        prompted, empty = self.unet(x, t)[0], self.unet(x, t, cond=self.uncond)[0]
        return empty + np.reshape(guidance, (-1, 1, 1, 1)) * (prompted - empty)

    def at(self, t: Any) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma at times (B,) or a single one."""
        column = self.abar[np.asarray(t)].reshape(-1, 1, 1, 1)
        return np.sqrt(column), np.sqrt(1 - column)

    def clean(self, x: Any, eps: Any, t: Any) -> np.ndarray:
        """The estimate of x_0."""
        alpha, sigma = self.at(t)
        return (x - sigma * eps) / alpha

    def noise(self, x0: Any, eps: Any, t: Any) -> np.ndarray:
        """alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self.at(t)
        return alpha * x0 + sigma * eps

    def ddim(self, x: Any, eps: Any, t: Any, s: Any) -> np.ndarray:
        """One DDIM move from t to s."""
        return self.noise(self.clean(x, eps, t), eps, s)

    def drawn(self, key: jax.Array, controls: Controls, method: str) -> Draw:
        """The times, guidance and noise of a consistency loss."""
        end, _ = METHODS[method]
        found = draw(key, self.shape, segments_of(controls), controls, self.rows["places"], end)
        return jax.tree.map(np.asarray, found)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the batch's latents."""
        return (len(self.rows["places"]), *self.run.latent_shape)

    def normal(self, key: jax.Array) -> np.ndarray:
        """Noise by (key, place)."""
        one = [jax.random.normal(jax.random.fold_in(key, int(place)), self.shape[1:]) for place in self.rows["places"]]
        return np.asarray(one, np.float64)


def below(uniform: Any, count: Any) -> np.ndarray:
    """An integer in 0..count-1 from a number in [0, 1), in float32 as the step has it."""
    product = np.asarray(uniform, np.float32) * np.asarray(count).astype(np.float32)
    return np.minimum(product.astype(np.int32), np.asarray(count) - 1)


def logits(judge: Judge, heads: Any, features: Mapping[str, Any]) -> np.ndarray:
    """A discriminator's logits with the places of each head as rows: (heads, B, places)."""
    found = judge.logits(heads, {tap: jnp.asarray(value) for tap, value in features.items()})
    return np.asarray([np.asarray(found[tap], np.float64).reshape(len(found[tap]), -1) for tap in judge.taps])


class Counted:
    """A UNet that counts its rows while a program runs: those it is begun on, and those whose output is used."""

    def __init__(self, network: Any) -> None:
        self._network, self.begun, self.used = network, 0, 0

    def __call__(self, params: Any, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        rows = x.shape[0]
        found = self._network(params, x, *args, **kwargs)
        output, taps = found if kwargs.get("taps") else (found, None)

        def begin(_: Any) -> None:
            self.begun += rows

        def use(_: Any) -> np.ndarray:
            self.used += rows
            return np.float32(0.0)

        jax.debug.callback(begin, jax.lax.stop_gradient(x[0, 0, 0, 0]))
        # A pure callback whose result nobody reads is left out of the program, as the blocks up are.
        zero = jax.pure_callback(use, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(output[0, 0, 0, 0]))
        output = output + zero.astype(output.dtype)
        return output if taps is None else (output, taps)

    def take(self, batch: int) -> tuple[float, float]:
        """(whole calls, calls whose output nobody reads) a sample since the last time."""
        jax.effects_barrier()
        found = self.used / batch, (self.begun - self.used) / batch
        self.begun = self.used = 0
        return found


def counted(opened: Opened, turn: Callable[[Components], Turn], keys: Sequence[jax.Array]) -> list[Any]:
    """For each key, what a turn's loss says of its calls and what was counted: (metrics, whole calls, half calls).

    Args:
        opened: the stage.
        turn: makes the turn for a model.
        keys: what to draw from; other keys take other steps of a trajectory.
    """
    job, components = opened.job, opened.run.pipe.components
    network = Counted(components.unet)
    loss = turn(dataclasses.replace(components, unet=network)).loss  # type: ignore[arg-type]
    compiled = quick_jit(lambda *given: loss(*given)[1])
    found = []
    with jax.sharding.use_abstract_mesh(opened.run.mesh.abstract_mesh):
        for key in keys:
            metrics = compiled(job.state.trainable, job.state.ema, job.frozen, opened.rows, key, job.controls)
            calls = {name: float(value) for name, value in metrics.items() if name.endswith("calls")}
            found.append((calls, *network.take(len(opened.rows["places"]))))
    return found


def same_bits(a: Any, b: Any) -> None:
    """The trees are equal, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def size(tree: Any) -> int:
    """Bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def relative_error(a: Any, b: Any) -> float:
    """Relative L2 error of one tree against another."""
    ours, theirs = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs.astype(np.float64)))
