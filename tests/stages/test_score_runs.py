"""Stages of score distillation on a tiny model: first rounds by hand, what moves, resuming, prompts alone, SDXL."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.config import load_config
from hypersd_jax.distill import draw_trajectory
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import opening, train
from hypersd_jax.stages import run as stage_run
from hypersd_jax.stages.kinds import DISCRIMINATOR, FAKE, STUDENT
from hypersd_jax.training import Checkpointer, abstract
from hypersd_jax.training.output import Output, create_output
from hypersd_jax.weights.tensors import open_tensors
from tests.helpers.score_runs import (
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
    size,
)
from tests.helpers.tiny_model import smaller, tiny_model
from tests.helpers.tiny_xl import tiny_xl

# Every term at once: both teachers of the two terms besides the score, and a discriminator with R1.
DMD = """
  - {name: dmd, kind: dmd, updates: 4, batch_size: 4, learning_rate: 1.0e-2, ema: 0.5, guidance: 30.0, weight: 0.7,
     fake_learning_rate: 1.0e-2, fake_updates: 1, regression: {steps: 3, weight: 0.2, teacher: early},
     anchor: {solver_steps: 4, weight: 0.6}, steps: [2],
     adversarial: {features: encoder, weight: 0.3, learning_rate: 1.0e-2, r1_weight: 0.1, r1_sigma: 0.1}}
"""
TAP = "down_blocks.0"
# The fake model hardly moves, so that its second update is seen from where the first began.
TDM = """
  - {name: tdm, kind: tdm, times: [999, 499], updates: 2, batch_size: 4, learning_rate: 1.0e-2, fake_updates: 2,
     fake_learning_rate: 1.0e-9, data_free: true, guidance: 30.0, anchor: {solver_steps: 4}, steps: [2], sampler: ddim}
"""
# The regression's rollout is one loop with the real scores here, and with the fake score below.
XL = """
  - {name: xl, kind: dmd, updates: 1, batch_size: 4, learning_rate: 1.0e-2, fake_updates: 1, guidance: 30.0,
     regression: {steps: 2, weight: 0.2, teacher: base}}
"""
UNET = """
  - {name: unet, kind: dmd, student: unet, times: [800], updates: 2, batch_size: 4, learning_rate: 1.0e-3,
     fake_updates: 1, guidance: 1.0, regression: {steps: 2, weight: 0.2, teacher: before}}
"""


class ScoreByHand(ByHand):
    """Both phases of a score stage, from the same draws."""

    def sample(self, drawn: Any, student: Any) -> tuple[np.ndarray, np.ndarray, int, int]:
        """(x_0, the point that is scored, the range of the times before it is clipped to the stage's)."""
        times, step = self.opened.stage.times, int(drawn.step)
        deterministic, x = self.opened.stage.kind == "tdm", np.asarray(drawn.noise, np.float64)
        for index in range(step + 1):
            eps = self.unet(x, times[index], student)[0]
            x0 = self.clean(x, eps, times[index])
            if index < step:
                if not deterministic:
                    eps = [jax.random.normal(jax.random.fold_in(key, index), x.shape[1:]) for key in drawn.keys]
                x = self.noise(x0, np.asarray(eps), times[index + 1])
        if not deterministic or step == len(times) - 1:
            return x0, x0, 0, times[step] if deterministic else 999
        return x0, self.noise(x0, eps, times[step + 1]), times[step + 1], times[step]

    def noised(self, key: jax.Array, student: Any, low: int, high: int) -> tuple[Any, Any, Any, Any, Any]:
        """(draws, x_0, x_t, t, b) of samples noised to times of low..high."""
        drawn = draw_trajectory(key, self.shape, len(self.opened.stage.times), self.batch["indices"])
        x0, x, first, last = self.sample(drawn, student)
        first, last = max(low, first), min(high, last)
        t = first + below(drawn.uniform, last - first + 1)
        clean = x is x0
        a, s = (1.0, 0.0) if clean else self.at(int(self.opened.stage.times[int(drawn.step) + 1]))
        alpha, sigma = self.at(t)
        b = np.sqrt(sigma**2 - (alpha / a * s) ** 2)
        return drawn, x0, alpha / a * x + b * np.asarray(drawn.eps), t, b

    def fake_loss(self, key: jax.Array, student: Any, fake: Any) -> tuple[float, Any, Any]:
        """(the fake model's loss, x_t, t)."""
        low, high = (20, 979) if self.opened.stage.kind == "tdm" else (0, 999)
        drawn, _, x_t, t, b = self.noised(key, student, low, high)
        eps = self.unet(x_t, t, fake)[0]
        return float(np.mean((b / self.at(t)[1] * eps - drawn.eps) ** 2)), x_t, t

    def gap(self, key: jax.Array, student: Any, fake: Any) -> tuple[np.ndarray, Any, Any, Any, Any]:
        """(the score's gradient, draws, x_0, x_t, t)."""
        drawn, x0, x_t, t, _ = self.noised(key, student, 20, 979)
        real = self.clean(x_t, self.guided(x_t, t, self.opened.stage.guidance), t)
        false = self.clean(x_t, self.unet(x_t, t, fake)[0], t)
        return (false - real) / np.abs(x0 - real).mean((1, 2, 3), keepdims=True), drawn, x0, x_t, t

    def regression(self, drawn: Any, x0: np.ndarray, predict: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
        """The mean squared distance of x_0 to the endpoint of a teacher's rollout."""
        x, times = np.asarray(drawn.noise, np.float64), self.opened.frozen.tables.regression_times
        for index, time in enumerate(times):
            t = np.full(len(x), time)
            eps = predict(x, t)
            end = self.clean(x, eps, t)
            x = self.noise(end, eps, np.full(len(x), times[min(index + 1, len(times) - 1)]))
        return float(np.mean((x0 - end) ** 2))

    def regulariser(self, key: jax.Array, student: Any, average: Any, latents: Any) -> float:
        """TSCD's loss of one segment under the guided base."""
        guidance, segments = self.opened.stage.guidance, self.opened.frozen.tables.segments
        d = self.drawn(jax.random.fold_in(key, 2**32 - 3), segments, (guidance, guidance))
        assert set(d.guidance) == {guidance}
        x = self.noise(latents, d.eps, d.t_n)
        before = self.ddim(x, self.guided(x, d.t_n, d.guidance), d.t_n, d.t_prev)
        target = self.ddim(before, self.unet(before, d.t_prev, average)[0], d.t_prev, d.t_end)
        return float(np.mean((self.ddim(x, self.unet(x, d.t_n, student)[0], d.t_n, d.t_end) - target) ** 2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smaller(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def dmd(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Opened:
    return open_stage(recipe(tmp_path_factory.mktemp("dmd"), model, DMD), "early", "late")


@pytest.fixture(scope="module")
def first(dmd: Opened) -> Step:
    return dmd.step()


@pytest.fixture(scope="module")
def by_hand(dmd: Opened) -> ScoreByHand:
    return ScoreByHand(dmd, [TAP])


def test_the_first_losses_of_the_fake_score_step_by_hand(dmd: Opened, first: Step, by_hand: ScoreByHand) -> None:
    key, discriminator = dmd.key(0), dmd.discriminator
    fake = by_hand.adapter(first.before.trainable[FAKE])
    loss, x_t, t = by_hand.fake_loss(key, by_hand.adapter(dmd.start), fake)
    assert loss == pytest.approx(first.metrics["fake_mse"], rel=TOLERANCE)
    assert by_hand.fake_loss(dmd.key(1), by_hand.adapter(dmd.start), fake)[0] != pytest.approx(loss, rel=1e-2)

    real = by_hand.noise(by_hand.batch["latents"], by_hand.normal(jax.random.fold_in(key, 2**32 - 4)), t)
    perturbed = real + dmd.stage.adversarial.r1_sigma * by_hand.normal(jax.random.fold_in(key, 2**32 - 5))
    heads = first.before.trainable[DISCRIMINATOR]
    real_logits, fake_logits, perturbed_logits = (
        logits(discriminator, heads, by_hand.unet(x, t, fake)[1]) for x in (real, x_t, perturbed)
    )
    hinge = np.maximum(1 - real_logits, 0).mean() + np.maximum(1 + fake_logits, 0).mean()
    assert hinge == pytest.approx(first.metrics["discriminator"], rel=TOLERANCE)
    right = [real_logits.mean((0, 2)) > 0, fake_logits.mean((0, 2)) < 0]
    assert np.mean(right) == first.metrics["accuracy"]
    slope = ((perturbed_logits - real_logits).mean((0, 2)) / dmd.stage.adversarial.r1_sigma) ** 2
    assert slope.mean() == pytest.approx(first.metrics["r1"], rel=10 * TOLERANCE)


def test_the_students_first_losses_by_hand(dmd: Opened, first: Step, by_hand: ScoreByHand) -> None:
    """Fake score model and discriminator are as their own phase left them; the student is as it started."""
    key = dmd.key(1)
    student, fake = by_hand.adapter(dmd.start), by_hand.adapter(first.after.trainable[FAKE])
    gradient, drawn, x0, x_t, t = by_hand.gap(key, student, fake)
    assert np.abs(gradient).mean() == pytest.approx(first.metrics["score_gap"], rel=TOLERANCE)
    discriminator = dmd.discriminator
    fake_logits = logits(discriminator, first.after.trainable[DISCRIMINATOR], by_hand.unet(x_t, t, fake)[1])
    generator = np.maximum(1 - fake_logits, 0).mean()
    assert generator == pytest.approx(first.metrics["generator"], rel=TOLERANCE)

    assert list(dmd.frozen.tables.regression_times) == [999, 666, 332]
    early = by_hand.adapter(dmd.students["early"])
    regression = by_hand.regression(drawn, x0, lambda x, t: by_hand.unet(x, t, early)[0])
    assert regression == pytest.approx(first.metrics["regression"], rel=TOLERANCE)
    regulariser = by_hand.regulariser(key, student, student, by_hand.batch["latents"])
    assert regulariser == pytest.approx(first.metrics["anchor"], rel=TOLERANCE)
    loss = 0.7 * 0.5 * np.mean(gradient**2) + 0.3 * generator + 0.2 * regression + 0.6 * regulariser
    assert loss == pytest.approx(first.metrics["loss"], rel=TOLERANCE)


def test_the_adversarial_gradient_runs_through_the_frozen_features(
    dmd: Opened, first: Step, by_hand: ScoreByHand
) -> None:
    """Of the student's loss only the adversarial term is left; its gradient by differentiating that directly."""
    alone = dmd.step(weight=0.0, regression__weight=0.0, anchor__weight=0.0, adversarial__weight=1.0)
    run, stage, key = dmd.run, dmd.stage, dmd.key(1)
    discriminator = dmd.discriminator
    drawn = draw_trajectory(key, by_hand.shape, 1, by_hand.batch["indices"])
    t = 20 + below(drawn.uniform, 960)
    a, s, last, deviation = (jnp.asarray(v, jnp.float32) for v in (*by_hand.at(t), *by_hand.at(999)))
    params, fake = dict(run.base.params["unet"]), by_hand.adapter(alone.after.trainable[FAKE])

    def term(start: Any) -> jax.Array:
        def unet(*given: Any, **more: Any) -> Any:
            return run.base.components.unet(params, *given, by_hand.cond.context, **more)

        eps = unet(drawn.noise, jnp.full(4, 999), adapter=by_hand.adapter(start))
        x_t = a * (drawn.noise - deviation * eps) / last + s * drawn.eps
        found = discriminator.logits(alone.after.trainable[DISCRIMINATOR], unet(x_t, t, adapter=fake, taps=(TAP,))[1])
        return jnp.mean(jax.nn.relu(1 - found[TAP]))

    value, wanted = jax.jit(jax.value_and_grad(term))(dmd.start)
    assert alone.metrics["loss"] == pytest.approx(float(value), rel=TOLERANCE)
    found = alone.gradient(STUDENT, clip_norm=stage.clip_norm, beta1=stage.beta1)
    assert relative_error(found, wanted) < TOLERANCE
    assert alone.metrics["grad_norm"] > 1e-4
    # Whatever the student's loss weighs, the others learn the same; without any term it has no gradient at all.
    nothing = dmd.step(weight=0.0, regression__weight=0.0, anchor__weight=0.0, adversarial__weight=0.0)
    assert nothing.metrics["grad_norm"] == 0.0
    same_bits(nothing.after.trainable[STUDENT], nothing.before.trainable[STUDENT])
    for model in (FAKE, DISCRIMINATOR):
        assert first.metrics[f"{model}_grad_norm"] > 0
        for other in (alone, nothing):
            same_bits(first.after.trainable[model], other.after.trainable[model])


def test_the_logged_calls_are_those_that_are_made(dmd: Opened) -> None:
    for phase, name in enumerate(("fake_calls", "calls")):
        ((calls, whole, half),) = counted(dmd, phase, [dmd.key(phase)])
        assert calls == {name: (whole + half / 2) * (dmd.stage.fake_updates if phase == 0 else 1)}
        # Student, fake model, and the features of the real side twice; then guidance, regression and regulariser.
        assert (whole, half) == ((2, 2) if phase == 0 else (1 + 2 + 1 + 3 + 4, 0))


def test_only_what_is_trained_is_in_the_state(dmd: Opened, first: Step) -> None:
    state = first.after
    assert state.trainable.keys() == state.opt_state.keys() == {STUDENT, FAKE, DISCRIMINATOR}
    assert state.ema.keys() == {STUDENT}
    student, fake, heads = (size(state.trainable[name]) for name in (STUDENT, FAKE, DISCRIMINATOR))
    assert student == fake
    # Weights and two moments each, the student's average, three counters of Adam and two of the state.
    assert size(state) == 3 * (student + fake + heads) + student + 5 * 4
    assert heads < student < size(dmd.run.base.params["unet"])
    for name in (STUDENT, FAKE, DISCRIMINATOR):
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), first.before.trainable[name], state.trainable[name])
        assert all(jax.tree.leaves(moved)) or name != STUDENT, name
        assert any(jax.tree.leaves(moved)), name


def test_stopped_after_two_rounds_and_gone_on(dmd: Opened, tmp_path: Path) -> None:
    """All three models end bit for bit where an uninterrupted run ends."""
    ends = {}
    for name in ("whole", "resumed"):
        output = Output(tmp_path / name)
        if name == "resumed":
            shutil.copytree(tmp_path / "whole", output.root)
            shutil.rmtree(output.checkpoints("dmd") / "4")
            (output.loras / "dmd.safetensors").unlink()
        else:
            create_output(output, dmd.run.config)
        run = dataclasses.replace(dmd.run, output=output)
        stage_run.run_stage(run, 0, dmd.stage)
        with Checkpointer(output.checkpoints("dmd")) as checkpoints:
            assert checkpoints.latest() == 4
            ends[name], _ = checkpoints.restore(4, abstract(run.mesh, dmd.state()))
        lines = [json.loads(line) for line in (output.root / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert all(line["skipped"] == 0 for line in lines)
    same_bits(ends["whole"], ends["resumed"])
    same_bits(*(_tensors(tmp_path / name / "loras" / "dmd.safetensors") for name in ends))


# MARK: prompts alone


def test_prompts_alone(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that reads no images, and its first step by hand; its student is scored along its own trajectory."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\na cat face\nblue car\n")
    monkeypatch.setattr(opening, "open_source", lambda *_args, **_kwargs: pytest.fail("images are opened"))
    opened = open_stage(recipe(tmp_path, model, TDM, source=str(prompts)))
    first, hand = opened.step(), ScoreByHand(opened)
    assert "latents" not in opened.batch
    student, fake = hand.adapter(opened.start), hand.adapter(first.before.trainable[FAKE])
    assert hand.fake_loss(opened.key(0, 1), student, fake)[0] == pytest.approx(first.metrics["fake_mse"], rel=TOLERANCE)
    gradient, _, x0, _, _ = hand.gap(opened.key(1), student, fake)
    assert np.abs(gradient).mean() == pytest.approx(first.metrics["score_gap"], rel=TOLERANCE)
    regulariser = hand.regulariser(opened.key(1), student, student, x0)
    assert regulariser == pytest.approx(first.metrics["anchor"], rel=TOLERANCE)
    stage_run.check_stages(opened.run)
    stage_run.run_stage(opened.run, 0, opened.stage)
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(first.metrics["loss"], rel=1e-6)
    assert (tmp_path / "out" / "samples" / "tdm.png").is_file()
    _calls_of_each_step(opened)


def _calls_of_each_step(opened: Opened) -> None:
    """As many calls as the drawn step takes, in either phase."""
    keys = [jax.random.key(seed) for seed in range(6)]
    steps = [int(draw_trajectory(key, (4, 8, 8, 4), 2).step) for key in keys]
    assert set(steps) == {0, 1}
    for phase, name in enumerate(("fake_calls", "calls")):
        for step, (calls, whole, half) in zip(steps, counted(opened, phase, keys), strict=True):
            assert calls == {name: whole * (2 if phase == 0 else 1)}
            assert (whole, half) == (step + 2 if phase == 0 else step + 1 + 2 + 1 + 4, 0)


def test_what_prompts_alone_cannot_do(tmp_path: Path, model: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\n")
    for stages, overrides, words in (
        (TDM, ["data.cache=somewhere"], r"data\.cache: no stage of this run reads images"),
        ("  - {name: s, k: 1, solver_steps: 4, updates: 1, batch_size: 4}", [], r"prompts\.txt has no images"),
        (DMD, [], r"prompts\.txt has no images"),
    ):
        with pytest.raises(UserError, match=words):
            train(recipe(tmp_path, model, stages, *overrides, source=str(prompts)))
    with pytest.raises(UserError, match=r"regression\.teacher='early': only base can be it here"):
        train(recipe(tmp_path, model, DMD))
    assert not (tmp_path / "out").exists()


# MARK: SDXL's shape, and full fine-tuning


def test_a_round_of_sdxls_shape_by_hand(tmp_path: Path) -> None:
    opened = open_stage(recipe(tmp_path, smaller(tiny_xl(tmp_path / "model")), XL))
    first, hand = opened.step(), ScoreByHand(opened)
    assert all(np.isfinite(value) for value in first.metrics.values())
    assert first.metrics["skipped"] == 0
    assert first.metrics["grad_norm"] > 0
    student = hand.adapter(opened.start)
    fake = hand.adapter(first.before.trainable[FAKE])
    assert hand.fake_loss(opened.key(0), student, fake)[0] == pytest.approx(first.metrics["fake_mse"], rel=TOLERANCE)
    fake = hand.adapter(first.after.trainable[FAKE])
    gradient, drawn, x0, _, _ = hand.gap(opened.key(1), student, fake)
    gap = np.abs(gradient).mean()
    assert gap == pytest.approx(first.metrics["score_gap"], rel=TOLERANCE)
    regression = hand.regression(drawn, x0, lambda x, t: hand.guided(x, t, opened.stage.guidance))
    assert regression == pytest.approx(first.metrics["regression"], rel=TOLERANCE)
    # Zeros are the unconditional, with the images' own time ids; text gives another number, as other ids do.
    assert not np.any(hand.uncond.context)
    assert not np.any(hand.uncond.pooled)
    np.testing.assert_array_equal(hand.uncond.time_ids, hand.cond.time_ids)
    cond, uncond = hand.cond, hand.uncond
    for changed in (
        (cond._replace(time_ids=cond.time_ids + 8.0), uncond),
        (cond._replace(pooled=cond.pooled[::-1]), uncond),
        (cond, uncond._replace(context=cond.context[::-1])),
    ):
        hand.cond, hand.uncond = changed
        assert abs(np.abs(hand.gap(opened.key(1), student, fake)[0]).mean() / gap - 1) > 10 * TOLERANCE


def test_a_fully_fine_tuned_student(tmp_path: Path, model: Path) -> None:
    opened = open_stage(recipe(tmp_path, model, UNET), "before")
    components = opened.run.base.components
    first, hand = opened.step(), ScoreByHand(opened)
    # The student begins as the base with the LoRA before it merged in.
    before, fake = (hand.adapter(each) for each in (opened.students["before"], first.after.trainable[FAKE]))
    gradient, drawn, x0, _, _ = hand.gap(opened.key(1), before, fake)
    assert np.abs(gradient).mean() == pytest.approx(first.metrics["score_gap"], rel=TOLERANCE)
    regression = hand.regression(drawn, x0, lambda x, t: hand.unet(x, t, before)[0])
    assert regression == pytest.approx(first.metrics["regression"], rel=TOLERANCE)
    masters = opened.state().trainable[STUDENT]
    assert {leaf.dtype for leaf in masters.values()} == {np.dtype(np.float32)}
    merged = {path for path, leaf in masters.items() if np.any(leaf != components.params["unet"][path])}
    assert merged == {f"{module}.kernel" for module in opened.start}
    stage_run.run_stage(opened.run, 0, opened.stage)
    folder = tmp_path / "out" / "models" / "unet"
    parts = {
        "unet": "diffusion_pytorch_model.safetensors",
        "vae": "diffusion_pytorch_model.safetensors",
        "text_encoder": "model.safetensors",
    }
    for part, file in parts.items():
        before, after = (_tensors(root / part / file) for root in (model, folder))
        assert before.keys() == after.keys()
        changed = {key for key in before if np.any(before[key] != after[key])}
        assert changed == (set(before) if part == "unet" else set()), part
    assert not list((tmp_path / "out" / "loras").glob("*"))
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.schedule.prediction_type == "epsilon"
    assert load_config(tmp_path / "recipe.yaml").stages[0].sampler == "lcm"


def _tensors(path: Path) -> dict[str, np.ndarray]:
    with open_tensors(path) as file:
        return {key: file.read(key) for key in file.keys()}  # noqa: SIM118
