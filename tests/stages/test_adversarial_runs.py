"""Consistency stages with a discriminator, and students that keep their guidance: the first step by hand, and more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.distill import Draw
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import train
from hypersd_jax.stages.kinds import DISCRIMINATOR, STUDENT
from hypersd_jax.weights.tensors import open_tensors
from tests.helpers.score_runs import (
    MIDDLE,
    TOLERANCE,
    ByHand,
    Opened,
    Step,
    below,
    counted,
    logits,
    open_stage,
    recipe,
    relative_error,
    same_bits,
)
from tests.helpers.tiny_model import smaller, tiny_model

# The heads hardly move, so that their second update is seen from where the first began.
PAIR = """
  - {name: pair, k: 2, solver_steps: 8, updates: 1, batch_size: 4, learning_rate: 1.0e-2, guidance: [20, 40],
     distance_weight: 0.5,
     adversarial: {features: pair, updates: 2, weight: 0.3, learning_rate: 1.0e-9, r1_weight: 0.1, r1_sigma: 0.1}}
"""
# A skipped stage changes nothing in the next one, whose first step is computed by hand as the first stage's.
KEEPING = """
  - {name: skipped, k: 8, solver_steps: 40, updates: 3, batch_size: 2, skip: true}
  - {name: keeping, kind: pcm, k: 2, solver_steps: 4, updates: 2, batch_size: 4, learning_rate: 1.0e-2, ema: 0.5,
     guidance: [1, 1], prompt_dropout: 0.5, sample_guidance: 3.0, distance_weight: 0.5,
     adversarial: {features: encoder, loss: non_saturating, weight: 0.3}}
"""
ENCODER = ("down_blocks.0", "mid_block")


class PairInputs(NamedTuple):
    """Inputs of the discriminator of a consistency stage."""

    draw: Draw
    prediction: np.ndarray
    target: np.ndarray
    x_t: np.ndarray
    t: np.ndarray
    noises: np.ndarray


class ConsistencyByHand(ByHand):
    """The consistency pair of a stage and its adversarial inputs, from the same random draws."""

    def pair(self, key: jax.Array, student: Any, *, guided: bool) -> PairInputs:
        stage = self.opened.stage
        d = self.drawn(key, self.opened.frozen.segments, stage.guidance, stage.kind)
        x = self.noise(self.batch["latents"], d.eps, d.t_n)
        teacher = self.guided(x, d.t_n, d.guidance) if guided else self.unet(x, d.t_n)[0]
        before = self.ddim(x, teacher, d.t_n, d.t_prev)
        target = self.ddim(before, self.unet(before, d.t_prev, student)[0], d.t_prev, d.t_end)
        prediction = self.ddim(x, self.unet(x, d.t_n, student)[0], d.t_n, d.t_end)
        uniform, noises = [], []
        for index in self.batch["indices"]:
            keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 2**32 - 1), int(index)))
            uniform.append(jax.random.uniform(keys[0]))
            noises.append(jax.random.normal(keys[1], (3, *self.shape[1:])))
        t = d.t_end + below(uniform, d.t_top - d.t_end + 1)
        return PairInputs(d, prediction, target, x, t, np.moveaxis(np.asarray(noises, np.float64), 1, 0))

    def renoised(self, x: np.ndarray, inputs: PairInputs, number: int) -> np.ndarray:
        ratio = (self.abar[inputs.t] / self.abar[inputs.draw.t_end]).reshape(-1, 1, 1, 1)
        return np.sqrt(ratio) * x + np.sqrt(1 - ratio) * inputs.noises[number]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smaller(tiny_model(tmp_path_factory.mktemp("model")), middle=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Opened:
    return open_stage(recipe(tmp_path_factory.mktemp("pair"), model, PAIR), "before")


@pytest.fixture(scope="module")
def first(pair: Opened) -> Step:
    return pair.step()


@pytest.fixture(scope="module")
def by_hand(pair: Opened) -> ConsistencyByHand:
    return ConsistencyByHand(pair, [MIDDLE])


def test_the_first_step_by_hand(pair: Opened, first: Step, by_hand: ConsistencyByHand) -> None:
    """Both sides, noised further, with the features of the step's start; the phase before has not moved the heads."""
    found, discriminator, heads = first.metrics, pair.discriminator, first.before.trainable[DISCRIMINATOR]
    inputs = by_hand.pair(pair.key(1), by_hand.adapter(pair.start), guided=True)
    assert np.all(inputs.draw.t_end <= inputs.draw.t_prev)
    assert np.all(inputs.t <= inputs.draw.t_top)
    mse = np.mean((inputs.prediction - inputs.target) ** 2)
    assert mse == pytest.approx(found["mse"], rel=TOLERANCE)
    start = by_hand.unet(inputs.x_t, inputs.draw.t_n)[1]

    def seen(x: np.ndarray) -> np.ndarray:
        features = by_hand.unet(x, inputs.t)[1]
        return logits(discriminator, heads, {MIDDLE: np.concatenate([features[MIDDLE], start[MIDDLE]], axis=-1)})

    fake, real = by_hand.renoised(inputs.prediction, inputs, 0), by_hand.renoised(inputs.target, inputs, 1)
    fake_logits, real_logits, perturbed_logits = seen(fake), seen(real), seen(real + 0.1 * inputs.noises[2])
    hinge = np.maximum(1 - real_logits, 0).mean() + np.maximum(1 + fake_logits, 0).mean()
    slope = np.mean(((perturbed_logits - real_logits).mean((0, 2)) / 0.1) ** 2)
    generator = np.maximum(1 - fake_logits, 0).mean()
    assert hinge == pytest.approx(found["discriminator"], rel=TOLERANCE)
    assert slope == pytest.approx(found["r1"], rel=10 * TOLERANCE)
    assert generator == pytest.approx(found["generator"], rel=TOLERANCE)
    assert np.mean([real_logits.mean((0, 2)) > 0, fake_logits.mean((0, 2)) < 0]) == found["accuracy"]
    loss = 0.5 * mse + 0.3 * generator + hinge + 0.1 * slope
    assert loss == pytest.approx(found["loss"], rel=TOLERANCE)
    assert found["grad_norm"] > 0
    assert found["discriminator_grad_norm"] > 0
    assert first.after.trainable.keys() == first.after.opt_state.keys() == {STUDENT, DISCRIMINATOR}
    assert first.after.ema.keys() == {STUDENT}


def test_without_a_distance_the_student_learns_through_the_frozen_features(
    pair: Opened, first: Step, by_hand: ConsistencyByHand
) -> None:
    alone, run = pair.step(distance_weight=0.0, adversarial__weight=1.0), pair.run
    inputs, discriminator, heads = (
        by_hand.pair(pair.key(1), None, guided=True),
        pair.discriminator,
        first.before.trainable[DISCRIMINATOR],
    )
    params, d = dict(run.base.params["unet"]), inputs.draw
    (a, s), (a_end, s_end) = by_hand.at(d.t_n), by_hand.at(d.t_end)
    ratio = (by_hand.abar[inputs.t] / by_hand.abar[d.t_end]).reshape(-1, 1, 1, 1)
    start = by_hand.unet(inputs.x_t, d.t_n)[1][MIDDLE]
    constants = (a, s, a_end, s_end, np.sqrt(ratio), np.sqrt(1 - ratio) * inputs.noises[0], inputs.x_t)
    given = [jnp.asarray(each, jnp.float32) for each in constants]

    def term(factors: Any, a: Any, s: Any, a_end: Any, s_end: Any, kept: Any, added: Any, x: Any) -> jax.Array:
        def unet(*where: Any, **more: Any) -> Any:
            return run.base.components.unet(params, *where, by_hand.cond.context, **more)

        eps = unet(x, d.t_n, adapter=by_hand.adapter(factors))
        fake = kept * (a_end * (x - s * eps) / a + s_end * eps) + added
        seen = jnp.concatenate([unet(fake, inputs.t, taps=(MIDDLE,))[1][MIDDLE], start], axis=-1)
        return jnp.mean(jax.nn.relu(1 - discriminator.logits(heads, {MIDDLE: seen})[MIDDLE]))

    wanted = jax.jit(jax.grad(term))(pair.start, *given)
    found = alone.gradient(STUDENT, clip_norm=pair.stage.clip_norm, beta1=pair.stage.beta1)
    assert relative_error(found, wanted) < TOLERANCE
    assert alone.metrics["grad_norm"] > 1e-4
    # The discriminator's own loss gives the student nothing, and the student's term gives the heads nothing.
    nothing = pair.step(distance_weight=0.0, adversarial__weight=0.0)
    assert nothing.metrics["grad_norm"] == 0.0
    same_bits(nothing.after.trainable[STUDENT], nothing.before.trainable[STUDENT])
    for other in (alone, nothing):
        same_bits(first.after.opt_state[DISCRIMINATOR], other.after.opt_state[DISCRIMINATOR])


def test_the_logged_calls_are_those_that_are_made(pair: Opened) -> None:
    """Student, teacher twice, target; and the blocks down of both sides and of R1's."""
    logged = ({"discriminator_calls": 5.5}, {"calls": 5.5})
    for (calls, whole, half), wanted in zip(_calls(pair), logged, strict=True):
        assert (whole, half) == (4, 3)
        assert calls == wanted


def _calls(opened: Opened) -> list[Any]:
    """Of each phase, what it logs and what was counted."""
    return [
        found
        for phase in range(opened.stage.adversarial.updates)
        for found in counted(opened, phase, [opened.key(phase)])
    ]


# MARK: students that keep their guidance


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Opened:
    return open_stage(recipe(tmp_path_factory.mktemp("keeping"), model, KEEPING))


def test_the_teacher_is_asked_once(keeping: Opened) -> None:
    ((calls, whole, half),) = _calls(keeping)
    assert (whole, half) == (3, 2)
    assert calls == {"calls": 4}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Opened:
    """The same, trained."""
    config = recipe(tmp_path_factory.mktemp("kept"), model, KEEPING)
    train(config)
    return open_stage(config)


def test_the_first_round_with_dropped_prompts_by_hand(kept: Opened) -> None:
    lines = [json.loads(line) for line in (kept.run.output.root / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("keeping", 1), ("keeping", 2)]
    assert [path.stem for path in kept.run.output.loras.glob("*.safetensors")] == ["keeping"]
    hand, discriminator, key = ConsistencyByHand(kept, ENCODER), kept.discriminator, kept.key(0)
    assert discriminator.taps == ENCODER
    heads = kept.state().trainable[DISCRIMINATOR]
    mine = [jax.random.fold_in(jax.random.fold_in(key, 2**32 - 2), int(index)) for index in hand.batch["indices"]]
    dropped = np.asarray([jax.random.uniform(each) for each in mine]) < 0.5
    assert set(dropped) == {True, False}

    def losses() -> tuple[float, float, float]:
        inputs = hand.pair(key, None, guided=False)
        assert set(inputs.draw.guidance) == {1.0}
        fake_logits, real_logits = (
            logits(discriminator, heads, hand.unet(hand.renoised(x, inputs, number), inputs.t)[1])
            for number, x in enumerate((inputs.prediction, inputs.target))
        )
        generator = np.logaddexp(0, -fake_logits).mean()
        own = np.logaddexp(0, -real_logits).mean() + np.logaddexp(0, fake_logits).mean()
        return float(np.mean((inputs.prediction - inputs.target) ** 2)), float(generator), float(own)

    with_all = losses()
    context = np.where(dropped[:, None, None], hand.uncond.context, hand.cond.context)
    hand.cond = hand.cond._replace(context=jnp.asarray(context))
    mse, generator, own = losses()
    assert mse == pytest.approx(lines[0]["mse"], rel=TOLERANCE)
    assert abs(with_all[0] / mse - 1) > 10 * TOLERANCE
    assert generator == pytest.approx(lines[0]["generator"], rel=TOLERANCE)
    assert own == pytest.approx(lines[0]["discriminator"], rel=TOLERANCE)
    assert 0.5 * mse + 0.3 * generator + own == pytest.approx(lines[0]["loss"], rel=TOLERANCE)


def test_its_file_says_guidance_and_negative_prompts_work(kept: Opened, model: Path) -> None:
    file = kept.run.output.loras / "keeping.safetensors"
    with open_tensors(file) as opened:
        header = opened.metadata
    assert (header["guidance"], header["sampler"], header["steps"]) == ("3.0", "ddim", "2")
    pipe = Pipeline.from_pretrained(model)
    pipe.load_lora(file)
    assert pipe.settings().guidance == 3.0
    call: dict[str, Any] = {"output": "np", "stepwise": True}
    plain, steered = (pipe("red apple", negative, **call) for negative in (None, "blob style, blue"))
    assert np.abs(plain - steered).max() > 1e-3
    assert np.abs(plain - pipe("red apple", guidance=0.0, **call)).max() > 1e-3
