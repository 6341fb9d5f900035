"""Stages of several models on a tiny base: opened, stepped by hand, their parts by NumPy and direct UNet calls."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypersd_jax import adapters
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import Config, load_config
from hypersd_jax.distill import METHODS, Draw, Segments, draw
from hypersd_jax.stages import run as stage_run
from hypersd_jax.stages.adversarial import Discriminator, make_discriminator
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import STUDENT, Kind, kind_of
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import TrainState, init_state
from hypersd_jax.training.output import create_output, open_output
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


def recipe(folder: Path, model: Path, stages: str, *overrides: str, source: str = "emoji") -> Config:
    """The configuration of a run whose output is folder/out."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(output=folder / "out", model=model, source=source, stages=stages))
    return load_config(path, overrides)


class Step(NamedTuple):
    """A training step: the host's copy of the state before and after, and what it logged."""

    before: Any
    after: Any
    metrics: dict[str, float]

    def gradient(self, model: str, *, clip_norm: float, beta1: float) -> Any:
        """The gradient that a model's first update took, read back from Adam's first moment."""
        moment = optax.tree.get(self.after.opt_state[model], "mu")
        norm = self.metrics.get(f"{model}_grad_norm", self.metrics["grad_norm"])
        return jax.tree.map(lambda leaf: np.asarray(leaf) / (1 - beta1) * max(1.0, norm / clip_norm), moment)


@dataclasses.dataclass(kw_only=True)
class Opened:
    """The only stage of a run, ready for its first step, with what stages before it would have left."""

    run: Run
    stage: Any
    start: Any
    students: dict[str, Any]

    @property
    def kind(self) -> Kind:
        return kind_of(self.stage)

    @functools.cached_property
    def frozen(self) -> Any:
        return self.kind.frozen(self.run, self.stage)

    @functools.cached_property
    def discriminator(self) -> Discriminator:
        found = make_discriminator(self.run.base, self.stage.adversarial)
        assert found is not None
        return found

    def state(self) -> TrainState:
        """Before the first step."""
        trainable = self.kind.trainable(self.run, 0, self.stage)
        return init_state(trainable, self.stage, averaged=(STUDENT,), mesh=self.run.mesh)

    @functools.cached_property
    def batch(self) -> dict[str, Any]:
        """The first batch, without the axis of micro-batches."""
        _, batch, _ = next(self.kind.batches(self.run, 0, self.stage, self.frozen, 0))
        return jax.tree.map(lambda leaf: leaf[0], batch)

    def key(self, phase: int | None, repeat: int = 0) -> jax.Array:
        """Key of a phase of the first step; None is the only phase of a single model."""
        key = jax.random.fold_in(stream(self.run.config.seed, Stream.NOISE, 0), 0)
        for number in () if phase is None else (phase, repeat):
            key = jax.random.fold_in(key, number)
        return key

    def step(self, **changed: float) -> Step:
        """The first step, with some of the stage's numbers changed: ``weight``, ``regression__weight``."""
        state = self.state()
        before = jax.device_get(state)
        batch = jax.tree.map(lambda leaf: leaf[None], self.batch)
        key = stream(self.run.config.seed, Stream.NOISE, 0)
        after, metrics = self.run.step(state, self.frozen, batch, key, with_numbers(self.stage, **changed))
        found = {name: float(value) for name, value in metrics.items()}
        return Step(before, jax.device_get(after), found)


def with_numbers(stage: Any, **changed: float) -> Any:
    """A stage as it is inside the step, with other numbers, which need not be ones that a recipe may have."""
    settings = jax.tree.map(lambda leaf: leaf, stage)
    for name, value in changed.items():
        *parents, last = name.split("__")
        where = functools.reduce(getattr, parents, settings)
        assert last in vars(where)
        vars(where)[last] = np.float32(value)
    return settings


def open_stage(config: Config, *before: str) -> Opened:
    """Open the only stage of a run, after stages of these names: random students, from the last of whom it starts."""
    output = open_output(config)
    run = stage_run.open_run(config, output)
    create_output(output, config)
    students = {name: randomised(run.student, seed) for seed, name in enumerate(before)}
    run.students = {name: adapters.join(factors, run.scales) for name, factors in students.items()}
    if before:
        run.student = students[before[-1]]
    (stage,) = config.adapter_stages
    return Opened(run=run, stage=stage, start=run.student, students=students)


def randomised(tree: Any, seed: int, scale: float = 0.05) -> Any:
    """The tree with noise added to every leaf."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + np.float32(scale) * random.standard_normal(leaf.shape, np.float32), tree)


class ByHand:
    """The networks of a stage called directly, and the arithmetic of its losses in NumPy, float64."""

    def __init__(self, opened: Opened, taps: Sequence[str] = ()) -> None:
        self.opened, self.run, self.taps = opened, opened.run, tuple(taps)
        self.batch = jax.tree.map(np.asarray, opened.batch)
        self.cond: Conditioning = opened.batch["cond"]
        self.uncond = self.run.base.unconditional(self.run.uncond, self.cond)
        betas = np.linspace(tiny.SCHEDULER["beta_start"] ** 0.5, tiny.SCHEDULER["beta_end"] ** 0.5, 1000) ** 2
        self.abar = np.cumprod(1 - betas)
        self.none = self.adapter(jax.tree.map(jnp.zeros_like, opened.start))
        network = self.run.base.components.unet

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
        weights = dict(self.run.base.params["unet"]) if params is None else params
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

    def drawn(self, key: jax.Array, segments: Segments, guidance: tuple[float, float], method: str = "tscd") -> Draw:
        """The times, guidance and noise of a consistency loss."""
        end, _ = METHODS[method]
        found = draw(key, self.shape, segments, guidance=guidance, indices=self.batch["indices"], target=end)
        return jax.tree.map(np.asarray, found)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the batch's latents."""
        return (len(self.batch["indices"]), *self.run.base.latent_shape)

    def normal(self, key: jax.Array) -> np.ndarray:
        """Draw noise by (key, batch index)."""
        one = [
            jax.random.normal(jax.random.fold_in(key, int(index)), self.shape[1:]) for index in self.batch["indices"]
        ]
        return np.asarray(one, np.float64)


def below(uniform: Any, count: Any) -> np.ndarray:
    """An integer in 0..count-1 from a number in [0, 1), in float32 as the step has it."""
    product = np.asarray(uniform, np.float32) * np.asarray(count).astype(np.float32)
    return np.minimum(product.astype(np.int32), np.asarray(count) - 1)


def logits(discriminator: Discriminator, heads: Any, features: Mapping[str, Any]) -> np.ndarray:
    """Flatten a discriminator's logits: (heads, B, positions)."""
    found = discriminator.logits(heads, {tap: jnp.asarray(value) for tap, value in features.items()})
    return np.asarray([np.asarray(found[tap], np.float64).reshape(len(found[tap]), -1) for tap in discriminator.taps])


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


def counted(opened: Opened, phase: int, keys: Sequence[jax.Array]) -> list[Any]:
    """For each key, what a phase's loss says of its calls and what was counted: (metrics, whole calls, half calls).

    Args:
        opened: the stage.
        phase: which one of a step.
        keys: what to draw from; other keys take other steps of a trajectory.
    """
    network = Counted(opened.run.base.components.unet)
    base = opened.run.base.around(dataclasses.replace(opened.run.base.components, unet=network))  # type: ignore[arg-type]
    loss = opened.kind.phases(base, opened.stage)[phase].loss
    compiled = quick_jit(lambda *given: loss(*given)[1])
    found, state = [], opened.state()
    with jax.sharding.use_abstract_mesh(opened.run.mesh.abstract_mesh):
        for key in keys:
            metrics = compiled(state.trainable, state.ema, opened.frozen, opened.batch, key)
            calls = {name: float(value) for name, value in metrics.items() if name.endswith("calls")}
            found.append((calls, *network.take(len(opened.batch["indices"]))))
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
