"""Full runs of the kinds that the default recipe is not: SDXL's conditioning, v-prediction, pseudo-Huber.

The first update's loss is also computed by hand. There the student's LoRA is still zero, so student, target and teacher
are one UNet, which is called here without any code of `hypersd_jax.distill` but the draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import load_config
from hypersd_jax.data import open_source
from hypersd_jax.distill import draw
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import consistency, train
from hypersd_jax.stages import run as stage_run
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training.output import open_output
from hypersd_jax.weights.components import Components
from tests.helpers import tiny_model as tiny
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tiny_xl import tiny_xl

RECIPE = """
output_dir: {output}
model: {model}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 4}}
log: {{checkpoint_every: 2, tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
  - {{name: two, k: 2, solver_steps: 8, updates: 2, batch_size: 4, learning_rate: 1.0e-2, guidance: [2, 4], ema: 0.5}}
  - {{name: one, k: 1, solver_steps: 4, updates: 2, batch_size: 4, learning_rate: 1.0e-2, guidance: [2, 4], ema: 0.5}}
"""
TOLERANCE = 1e-4
"""Relative, of a float32 loss that two programs compute."""
HUBER_C = 0.02


class Kind(NamedTuple):
    model: Callable[[Path], Path]
    overrides: tuple[str, ...] = ()
    prediction: str = "epsilon"
    xl: bool = False
    distance: Callable[[np.ndarray], np.ndarray] = np.square


KINDS = {
    "sdxl": Kind(tiny_xl, xl=True),
    "v_prediction": Kind(lambda folder: tiny_model(folder, "v_prediction"), prediction="v_prediction"),
    "pseudo_huber": Kind(
        tiny_model,
        ("stages.*.distance=pseudo_huber", f"stages.*.huber_c={HUBER_C}"),
        distance=lambda d: np.sqrt(d**2 + HUBER_C**2) - HUBER_C,
    ),
}


class Finished(NamedTuple):
    name: str
    kind: Kind
    config: Any
    model: Path
    out: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=KINDS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    model, recipe = kind.model(folder / "model"), folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(output=folder / "out", model=model))
    config = load_config(recipe, kind.overrides)
    return Finished(request.param, kind, config, model, train(config))


class FirstUpdate:
    """Everything that the loss of the first update is made of, and the loss by hand."""

    def __init__(self, found: Finished) -> None:
        self.kind, stage = found.kind, found.config.stages[0]
        run = stage_run.open_run(found.config, open_output(found.config))
        self.components: Components = run.base.components
        self.uncond = run.uncond
        frozen = consistency.frozen(run, stage)
        _, batch, _ = next(consistency.batches(run, 0, stage, frozen, 0))
        self.batch = jax.tree.map(lambda leaf: np.asarray(leaf[0]), batch)
        source = open_source(found.config.data, resolution=16, seed=found.config.seed)
        captions = source.batch(np.arange(stage.batch_size)).captions
        self.ids, self.empty_ids = run.base.prompts.tokenize(captions), run.base.prompts.tokenize([""])
        key = jax.random.fold_in(stream(found.config.seed, Stream.NOISE, 0), 0)
        shape, indices = self.batch["latents"].shape, self.batch["indices"]
        drawn = draw(key, shape, frozen.segments, guidance=stage.guidance, indices=indices)
        self.drawn = jax.tree.map(np.asarray, drawn)
        betas = np.linspace(tiny.SCHEDULER["beta_start"] ** 0.5, tiny.SCHEDULER["beta_end"] ** 0.5, 1000) ** 2
        self.abar = np.cumprod(1 - betas)
        self.unet = jax.jit(self.components.unet)

    def conditioning(self, ids: tuple[np.ndarray, ...] | None = None) -> Conditioning:
        """The captions through the text encoders themselves."""
        encoders, params = self.components.text_encoders, self.components.params
        outputs = [
            encoder(params[name], tokens)
            for (name, encoder), tokens in zip(encoders.items(), self.ids if ids is None else ids, strict=True)
        ]
        if not self.kind.xl:
            return Conditioning(outputs[0].last)
        # The embedded images are of 64 px, scaled to 16.
        sizes = np.tile(np.asarray([64, 64, 0, 0, 16, 16], np.float32), (len(outputs[0].last), 1))
        return Conditioning(jnp.concatenate([o.penultimate for o in outputs], -1), outputs[1].pooled, sizes)

    def predict(self, x: np.ndarray, t: np.ndarray, cond: Conditioning) -> np.ndarray:
        extra = {"pooled": cond.pooled, "time_ids": cond.time_ids} if self.kind.xl else {}
        out = self.unet(self.components.params["unet"], x.astype(np.float32), t, cond.context, **extra)
        return np.asarray(out, np.float64)

    def at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        column = self.abar[t].reshape(-1, 1, 1, 1)
        return np.sqrt(column), np.sqrt(1 - column)

    def ddim(self, x: np.ndarray, output: np.ndarray, t: np.ndarray, s: np.ndarray) -> np.ndarray:
        (a, b), (a_s, b_s) = self.at(t), self.at(s)
        if self.kind.prediction == "v_prediction":
            x0, eps = a * x - b * output, a * output + b * x
        else:
            x0, eps = (x - b * output) / a, output
        return a_s * x0 + b_s * eps

    def loss(self, cond: Conditioning, uncond: Conditioning) -> float:
        d = self.drawn
        a, b = self.at(d.t_n)
        x = a * self.batch["latents"] + b * d.eps
        prompted, unguided = self.predict(x, d.t_n, cond), self.predict(x, d.t_n, uncond)
        teacher = unguided + d.guidance.reshape(-1, 1, 1, 1) * (prompted - unguided)
        before = self.ddim(x, teacher, d.t_n, d.t_prev)
        target = self.ddim(before, self.predict(before, d.t_prev, cond), d.t_prev, d.t_end)
        student = self.ddim(x, prompted, d.t_n, d.t_end)
        return float(self.kind.distance(student - target).mean())


@pytest.fixture(scope="module")
def first(finished: Finished) -> FirstUpdate:
    return FirstUpdate(finished)


def test_the_loss_is_logged_and_finite(finished: Finished) -> None:
    assert [(line["stage"], line["step"]) for line in finished.lines] == [
        (s, n) for s in ("two", "one") for n in (1, 2)
    ]
    for line in finished.lines:
        assert line["skipped"] == 0
        for key in ("loss", "grad_norm", "update_norm"):
            assert np.isfinite(line[key]), key
            assert line[key] > 0, key


def test_every_students_images_differ_from_the_bases(finished: Finished) -> None:
    pipe = Pipeline.from_pretrained(finished.model)
    assert pipe.schedule.prediction_type == finished.kind.prediction
    call: dict[str, Any] = {"steps": 2, "sampler": "ddim", "guidance": 0.0, "output": "np", "stepwise": True}
    base, images = pipe("red apple", **call), {}
    for name in ("two", "one"):
        pipe.unload_lora()
        report = pipe.load_lora(finished.out / "loras" / f"{name}.safetensors")
        assert report.modules.keys() == {"unet"}
        images[name] = pipe("red apple", **call)
    for found in (images["two"] - base, images["one"] - base, images["one"] - images["two"]):
        assert np.sqrt(np.mean(found**2)) > 1e-3


def test_the_first_loss_by_hand(finished: Finished, first: FirstUpdate) -> None:
    empty, cond = first.conditioning(first.empty_ids), first.conditioning()
    uncond = _unconditional(first, cond, empty)
    logged = finished.lines[0]["loss"]
    assert first.loss(cond, uncond) == pytest.approx(logged, rel=TOLERANCE)
    # With the other families' unconditional it is another number.
    other = _repeated(empty, cond) if finished.kind.xl else Conditioning(jnp.zeros_like(cond.context))
    assert abs(first.loss(cond, other) / logged - 1) > 100 * TOLERANCE


@pytest.mark.parametrize("finished", ["sdxl"], indirect=True)
def test_what_conditions_sdxl(finished: Finished, first: FirstUpdate) -> None:
    cond, found = first.conditioning(), first.batch["cond"]
    np.testing.assert_allclose(found.context, cond.context, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.pooled, cond.pooled, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found.time_ids, cond.time_ids)
    assert found.context.shape[-1] == 2 * tiny.TEXT["hidden_size"]
    assert not np.any(first.uncond.context)
    assert not np.any(first.uncond.pooled)
    # The logged loss is that of the right ids and pooled text: others give another.
    logged = finished.lines[0]["loss"]
    for changed in (
        cond._replace(time_ids=cond.time_ids + np.asarray([[0, 0, 64, 64, 0, 0]], np.float32)),
        cond._replace(pooled=cond.pooled[::-1]),
    ):
        loss = first.loss(changed, _unconditional(first, changed, None))
        assert abs(loss / logged - 1) > 10 * TOLERANCE


def _repeated(row: Conditioning, cond: Conditioning) -> Conditioning:
    context = jnp.broadcast_to(row.context, cond.context.shape)
    pooled = None if cond.pooled is None else jnp.broadcast_to(row.pooled, cond.pooled.shape)
    return Conditioning(context, pooled, cond.time_ids)


def _unconditional(first: FirstUpdate, cond: Conditioning, empty: Conditioning | None) -> Conditioning:
    """SDXL: zeros with the conditional's own time ids; else the encoded empty prompt."""
    if first.kind.xl:
        return Conditioning(jnp.zeros_like(cond.context), jnp.zeros_like(cond.pooled), cond.time_ids)
    assert empty is not None
    return _repeated(empty, cond)
