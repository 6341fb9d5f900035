"""Feedback stages: a second LoRA trained on rewards, merged, guarded and resumed; and rewards in score distillation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax import adapters
from hypersd_jax.config import FeedbackStage, GuardConfig, JudgeConfig, ScoreStage
from hypersd_jax.distill import draw_trajectory
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.lite0 import features
from hypersd_jax.evaluation.metrics import diversity, kernel_distance
from hypersd_jax.rewards import REWARDS, LoadedReward
from hypersd_jax.stages import feedback as feedback_stage
from hypersd_jax.stages import rewards, train, watching
from hypersd_jax.stages.kinds import STUDENT, kind_of
from hypersd_jax.stages.rewards import TeacherFigures, teacher_figures
from hypersd_jax.stages.streams import Draw, drawn_from, normal
from hypersd_jax.training import Measured
from hypersd_jax.weights.lora import read_lora
from tests.helpers.quick import quick_jit
from tests.helpers.score_runs import TOLERANCE, ByHand, Opened, Step, open_stage, randomised, recipe, relative_error
from tests.helpers.short_runs import recipe as short_recipe
from tests.helpers.short_runs import records, same_tensors, sample_cheaply, share_steps

MARGIN = 2.0
STAGE = """
  - {name: liked, kind: feedback, updates: 1, batch_size: 4, learning_rate: 1.0e-2, times: [999, 499], rank: 2,
     merge_weight: 0.5, guidance: 1.0, anchor: null,
     feedback: {rewards: [{name: bright, path: x, margin: 2.0}], balanced: false, guards: {every: 2, images: 8}}}
"""
RUN = """
  - {name: two, k: 2, solver_steps: 8, updates: 1, batch_size: 4, learning_rate: 1.0e-2, guidance: [2, 4]}
  - {name: liked, kind: feedback, updates: 6, batch_size: 4, learning_rate: 1.0e-2, rank: 2,
     ema: 0.5, merge_weight: 0.5, guidance: 1.0, anchor: {weight: 0.1, solver_steps: 8},
     feedback: {rewards: [{name: bright, path: x}],
                guards: {every: 2, images: 4, judges: [{name: bright, path: judge}]}}}
"""
FIGURES = TeacherFigures(np.float32([2.0]), np.zeros((0, 1280), np.float32), np.asarray(""))
DMD_STAGE = ScoreStage(kind="dmd", name="scored", updates=1, batch_size=4, guidance=1.0)


class Bright:
    """A reward that needs no network: how bright the first row is, times what the prompt's length says."""

    def __call__(self, params: Any, images: jax.Array, ids: jax.Array) -> jax.Array:
        return params["scale"] * jnp.mean(images[:, 0], axis=(1, 2)) * ids[:, 0] / 3


def _tokens(prompts: Sequence[str]) -> np.ndarray:
    return np.asarray([[len(prompt) % 3 + 1] for prompt in prompts], np.int32)


BRIGHT = LoadedReward(model=Bright(), params={"scale": jnp.float32(3.0)}, tokenize=_tokens)


@pytest.fixture(scope="module", autouse=True)
def _rewards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REWARDS, "bright", lambda path: BRIGHT)
        patch.setitem(REWARDS, "mute", lambda path: lambda images, prompts: np.zeros(len(images)))
        yield


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Opened:
    return open_stage(recipe(tmp_path_factory.mktemp("feedback"), model, STAGE), "distilled")


@pytest.fixture(scope="module")
def first(opened: Opened) -> Step:
    return opened.step()


# MARK: one training step


def test_its_loss_by_hand(opened: Opened, first: Step) -> None:
    """Two steps along the student's trajectory, the decoder, relu(margin - reward) of each image."""
    hand = ByHand(opened)
    drawn = draw_trajectory(opened.key(None), hand.shape, 2, hand.batch["indices"], last=1)
    assert int(drawn.step) == 1
    student = hand.adapter(opened.start)  # the second LoRA begins at zero
    noise = np.asarray(drawn.noise, np.float64)
    x = hand.ddim(noise, hand.unet(noise, 999, student)[0], 999, 499)
    x0 = hand.clean(x, hand.unet(x, 499, student)[0], 499)
    base = opened.run.base
    decode = jax.jit(lambda params, x: base.decode(params, base.unscale(x)))
    images = np.asarray(decode(dict(base.params["vae"]), x0.astype(np.float32)), np.float64) * 0.5 + 0.5
    ids = hand.batch["reward_tokens"][0]
    assert sorted(np.unique(ids)) in ([1, 2], [2, 3], [1, 3], [1, 2, 3])
    scores = 3.0 * np.clip(images, 0, 1)[:, 0].mean((1, 2)) * ids[:, 0] / 3
    assert scores.mean() == pytest.approx(first.metrics["reward"], rel=TOLERANCE)
    loss = np.maximum(MARGIN - scores, 0).mean()
    assert loss == pytest.approx(first.metrics["loss"], rel=TOLERANCE)
    assert loss == pytest.approx(first.metrics["feedback"], rel=TOLERANCE)
    assert first.metrics["below_margin"] == np.mean(scores < MARGIN)
    assert first.metrics["calls"] == 2.0


def test_the_gradient_is_that_of_the_whole_chain(opened: Opened, first: Step) -> None:
    """Of the last step, decoder and reward in one; the steps before it have none."""
    hand, base, clip = ByHand(opened), opened.run.base, jax.lax.stop_gradient
    drawn = draw_trajectory(opened.key(None), hand.shape, 2, hand.batch["indices"], last=1)
    noise = np.asarray(drawn.noise, np.float64)
    x = hand.ddim(noise, hand.unet(noise, 999, hand.adapter(opened.start))[0], 999, 499)
    alpha, sigma = (jnp.asarray(each, jnp.float32) for each in hand.at(499))
    given, ids = jnp.asarray(x, jnp.float32), jnp.asarray(hand.batch["reward_tokens"][0])
    scales = {path: jnp.ones(2) for path in opened.start}

    def loss(factors: Any) -> jax.Array:
        both = adapters.concatenate([hand.adapter(opened.start), adapters.join(factors, scales)])
        times = np.full((len(x),), 499, np.int32)
        eps = base.components.unet(dict(base.params["unet"]), given, times, hand.cond.context, adapter=both)
        images = base.decode(dict(base.params["vae"]), base.unscale((given - sigma * eps) / alpha)) * 0.5 + 0.5
        inside = (images >= 0) & (images <= 1)
        # Outside 0..1 a brighter pixel is pulled in from below, and left alone above.
        seen = jnp.where(inside, images, jnp.where(images < 0, images - clip(images), clip(jnp.clip(images, 0, 1))))
        return jnp.mean(jax.nn.relu(MARGIN - BRIGHT.model(BRIGHT.params, seen, ids)))

    before = first.before.trainable[STUDENT]
    wanted = jax.jit(jax.grad(loss))(before)
    found = first.gradient(STUDENT, clip_norm=opened.stage.clip_norm, beta1=opened.stage.beta1)
    assert relative_error(found, wanted) < TOLERANCE


def test_redraws_are_the_last_step_from_fresh_noise(opened: Opened) -> None:
    """DRaFT-LV: the mean hinge of the sample and of predictions from it, noised to the last time by other noise."""
    stage = dataclasses.replace(opened.stage, redraws=2)
    (loss,) = (phase.loss for phase in opened.kind.phases(opened.run.base, stage))
    hand, key = ByHand(opened), opened.key(None)
    models = opened.kind.trainable(opened.run, 0, opened.stage)
    value, metrics = quick_jit(loss)(models, models, opened.frozen, opened.batch, key)
    drawn, student = draw_trajectory(key, hand.shape, 2, hand.batch["indices"], last=1), hand.adapter(opened.start)
    start = np.asarray(drawn.noise, np.float64)
    x = hand.ddim(start, hand.unet(start, 999, student)[0], 999, 499)
    found = [hand.clean(x, hand.unet(x, 499, student)[0], 499)]
    noises = normal(drawn_from(key, Draw.REDRAW), hand.batch["indices"], (2, *hand.shape[1:]))
    for number in range(2):
        x = hand.noise(found[0], np.asarray(noises[:, number], np.float64), 499)
        found.append(hand.clean(x, hand.unet(x, 499, student)[0], 499))
    base, ids = opened.run.base, hand.batch["reward_tokens"][0]
    decode = quick_jit(lambda x: base.decode(dict(base.params["vae"]), base.unscale(x)))
    images = [np.asarray(decode(each.astype(np.float32)), np.float64) * 0.5 + 0.5 for each in found]
    scores = np.stack([3.0 * np.clip(each, 0, 1)[:, 0].mean((1, 2)) * ids[:, 0] / 3 for each in images])
    assert np.maximum(MARGIN - scores, 0).mean() == pytest.approx(float(value), rel=TOLERANCE)
    assert scores.mean() == pytest.approx(float(metrics["reward"]), rel=TOLERANCE)
    assert metrics["calls"] == 4.0


def test_only_the_second_lora_is_trained(opened: Opened, first: Step) -> None:
    assert first.after.trainable.keys() == first.after.opt_state.keys() == {STUDENT}
    ranks = {entry["down"].shape[-1] for entry in first.after.trainable[STUDENT].values()}
    assert ranks == {2}
    assert any(np.abs(entry["up"]).max() > 0 for entry in first.after.trainable[STUDENT].values())
    assert {entry["scale"].shape for entry in opened.frozen.under.values()} == {(4,)}


# MARK: what is exported and passed on


def test_merged_is_two_files_is_merged_by_hand(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    sample_cheaply(monkeypatch)
    run, stage = opened.run, opened.stage
    own = randomised(opened.kind.trainable(run, 0, stage)[STUDENT], 3)
    before = dict(run.scales), run.student
    feedback_stage.finish(run, stage, own, trained=True)
    try:
        assert {scale.shape for scale in run.scales.values()} == {(6,)}
        assert {scale.shape for scale in run.fresh_scales.values()} == {(4,)}
        passed_on = adapters.join(run.student, run.scales)
    finally:
        run.scales, run.student = before
    files = (run.output.loras / f"liked{part}.safetensors" for part in ("", ".feedback"))
    one, alone = (read_lora(file, run.base.shapes) for file in files)
    first, second = adapters.join(run.student, run.scales), alone.adapters["unet"]
    for path, entry in one.adapters["unet"].items():
        wanted = _delta(first[path]) + 0.5 * _delta(second[path])
        for found in (entry, passed_on[path]):
            np.testing.assert_allclose(_delta(found), wanted, rtol=1e-4, atol=1e-6)


def _delta(entry: Any) -> np.ndarray:
    down, up, scale = (np.asarray(entry[name], np.float64) for name in ("down", "up", "scale"))
    return down * scale @ up


# MARK: whole runs


class Judged:
    """A measurement that needs no sampling: the judge's scores by step."""

    def __init__(self, by_step: dict[int, float]) -> None:
        self.every, self.tolerance, self.least, self._by_step = 2, 2.0, 0.1, by_step
        self.seen: list[int] = []

    def __call__(self, state: Any) -> Measured:
        step = int(state.step)
        self.seen.append(step)
        judged = self._by_step[step] + np.array([0.0, 5.0, -3.0]) + 0.01 * step * np.array([1.0, 0.0, -1.0])
        return Measured({"judge": float(judged.mean())}, {"strict": judged})


def _train(folder: Path, model: Path, judged: Judged | None, *overrides: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        sample_cheaply(patch)
        patch.setattr(rewards, "teacher_figures", lambda run, stage, config: FIGURES)
        patch.setattr(feedback_stage, "make_watch", lambda *args: judged)
        return train(short_recipe(folder, model, *overrides, stages=RUN))


@pytest.fixture(scope="module")
def rising(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return _train(tmp_path_factory.mktemp("rising"), model, Judged({0: 1.0, 2: 1.1, 4: 1.2, 6: 1.3}))


def test_a_run_logs_reward_and_judge(rising: Path) -> None:
    lines = [line for line in records(rising) if line["stage"] == "liked"]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [round(line["judge"], 2) for line in lines[::2]] == [1.67, 1.77, 1.87, 1.97]
    assert all("reward" in line and "anchor" in line for line in lines[1:])
    names = {path.name for path in (rising / "loras").glob("*.safetensors")}
    assert names == {"two.safetensors", "liked.safetensors", "liked.feedback.safetensors"}


def test_it_resumes_bit_for_bit(rising: Path, tmp_path: Path, model: Path) -> None:
    judged = {0: 1.0, 2: 1.1, 4: 1.2, 6: 1.3}
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, model, _interrupted(judged, 4))
    again = Judged(judged)
    output = _train(tmp_path, model, again)
    assert again.seen == [2, 4, 6]  # where it resumes is measured again
    same_tensors(output / "loras" / "liked.safetensors", rising / "loras" / "liked.safetensors")
    assert records(output) == records(rising)


def _interrupted(by_step: dict[int, float], at: int) -> Judged:
    class Interrupted(Judged):
        def __call__(self, state: Any) -> Measured:
            if int(state.step) == at:
                raise KeyboardInterrupt
            return super().__call__(state)

    return Interrupted(by_step)


def test_the_guard_stops_it_and_exports_the_best(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = _train(tmp_path, model, Judged({0: 1.0, 2: 1.1, 4: 0.5}))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped after" in line]
    assert "liked: stopped after update 4 of 6: the held-out judge strict has fallen by 0.6" in line
    assert "since update 2; the student of update 2 is exported" in line
    assert [line["step"] for line in records(output) if line["stage"] == "liked"] == [0, 1, 2, 3, 4]
    # The same command finds it finished; nothing is measured, trained or written again.
    written = (output / "loras" / "liked.safetensors").stat().st_mtime_ns
    nothing = Judged({})
    _train(tmp_path, model, nothing)
    assert not nothing.seen
    assert (output / "loras" / "liked.safetensors").stat().st_mtime_ns == written
    # What it exports is the student of update 2 of a run that was never stopped.
    short = _train(tmp_path / "short", model, None, "stages.liked.updates=2")
    same_tensors(output / "loras" / "liked.safetensors", short / "loras" / "liked.safetensors")


# MARK: margins, measurements, refusals


class FakePipe:
    """A pipeline whose images are as bright as the number of times that it was called."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, prompts: Sequence[str], **settings: Any) -> np.ndarray:
        self.calls.append(settings)
        return np.full((len(prompts) * settings["num_images"], 4, 4, 3), 0.25 * len(self.calls), np.float32)


def test_a_margin_is_measured_once(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FakePipe()
    monkeypatch.setitem(opened.run.__dict__, "pipe", pipe)
    (liked,) = opened.stage.feedback.rewards
    open_margin = dataclasses.replace(opened.stage.feedback, rewards=(dataclasses.replace(liked, margin=None), liked))
    (opened.run.output.checkpoints("liked") / "teacher.npz").unlink(missing_ok=True)
    found = rewards.margins(opened.run, opened.stage, open_margin)
    prompts, count = rewards.fixed_prompts(opened.run, GuardConfig(images=8))
    texts = rewards.repeated(prompts, count)
    wanted = BRIGHT(np.full((len(texts), 4, 4, 3), 0.25), texts).mean()
    assert found == pytest.approx([wanted, MARGIN])
    assert (pipe.calls[0]["steps"], pipe.calls[0]["guidance"]) == (rewards.TEACHER_STEPS, 1.0)
    # Read back, not measured again; and the recipe's margin counts, not the one of then.
    other = dataclasses.replace(open_margin, rewards=(open_margin.rewards[0], dataclasses.replace(liked, margin=7.0)))
    assert rewards.margins(opened.run, opened.stage, other) == pytest.approx([wanted, 7.0])
    assert teacher_figures(opened.run, opened.stage, other).features.shape == (8, 1280)
    assert len(pipe.calls) == 1
    guards = GuardConfig(every=2, images=24, judges=(JudgeConfig(name="bright", path="judge"),))
    with pytest.raises(UserError, match=r"stages\.liked\.feedback\.guards: its prompts are not those that "):
        teacher_figures(opened.run, opened.stage, dataclasses.replace(other, guards=guards))


def test_what_is_measured(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = JudgeConfig(name="bright", path="judge")
    guards = GuardConfig(every=2, images=8, judges=(judge,), perturbation=0.1)
    config = dataclasses.replace(opened.stage.feedback, guards=guards)
    images = np.random.default_rng(0).uniform(0.3, 0.7, (8, 4, 4, 3)).astype(np.float32)
    monkeypatch.setattr(watching, "exported_weights", lambda stage, state: state)
    teacher = TeacherFigures(np.float32([MARGIN]), features(rewards.to_bytes(images[::-1])), np.asarray(""))
    monkeypatch.setattr(watching, "teacher_figures", lambda *args: teacher)
    watch = watching.make_watch(opened.run, opened.stage, config, lambda *args: images)
    assert watch is not None
    prompts, count = rewards.fixed_prompts(opened.run, GuardConfig(images=8))
    texts = rewards.repeated(prompts, count)
    measured = watch("the student")  # type: ignore[arg-type]
    plain = BRIGHT(images, texts)
    noise = 0.1 * np.random.default_rng(0).standard_normal(images.shape, np.float32)
    changed = BRIGHT(np.clip(images + noise, 0, 1), texts)
    assert measured.judged.keys() == {"bright"}
    np.testing.assert_allclose(measured.judged["bright"], plain, rtol=1e-5)
    seen = features(rewards.to_bytes(images))
    wanted = {
        "fixed_reward": plain.mean(),
        "judge": plain.mean(),
        "sharpness": np.abs(changed - plain).mean(),
        "kid": kernel_distance(seen, seen[::-1]).mean,
        "recall": 1.0,
    }
    if count > 1:
        wanted["diversity"] = diversity(seen.reshape(len(prompts), count, -1)).mean()
    assert measured.metrics == pytest.approx(wanted, rel=1e-4)


def test_score_distillation_with_a_reward(opened: Opened) -> None:
    """Its term is there, after a feedback stage too, whose student's rank is the sum; the fake score model's is not."""
    stage = dataclasses.replace(DMD_STAGE, feedback=opened.stage.feedback)
    run, kind = opened.run, kind_of(stage)
    student, scales = run.student, run.scales
    both = adapters.concatenate([adapters.join(student, scales), adapters.join(student, scales)])
    try:
        run.student, run.scales = adapters.split(both)
        models, frozen = kind.trainable(run, 0, stage), kind.frozen(run, stage)
    finally:
        run.student, run.scales = student, scales
    fake, generated = (phase.loss for phase in kind.phases(run.base, stage))
    key = jax.random.key(0)
    metrics = jax.eval_shape(generated, models, models, frozen, opened.batch, key)[1]
    assert {"reward", "below_margin", "feedback", "score_gap"} <= metrics.keys()
    assert {entry["down"].shape[-1] for entry in models["fake"].values()} == {4}
    assert {entry["down"].shape[-1] for entry in models[STUDENT].values()} == {8}
    assert "fake_mse" in jax.eval_shape(fake, models, models, frozen, opened.batch, key)[1]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"name": "bright", "path": None}, "stages.liked.feedback.rewards.0: path is missing: the weights of bright"),
        ({"name": "brihgt", "path": "x"}, "'brihgt' is not a reward; did you mean bright?"),
        ({"name": "clip", "path": "nowhere"}, "rewards.0: nowhere"),
        ({"name": "mute", "path": "x"}, "'mute' scores images but cannot be trained on"),
        (
            {"name": "embedded:rewrad", "path": None},
            "the embedded ones are embedded:report, embedded:reward, emb",
        ),
        ({"name": "embedded:reward", "path": "x"}, "path=x: embedded:reward has weights of its own"),
    ],
)
def test_a_reward_that_cannot_be_trained_on(opened: Opened, change: dict[str, Any], line: str) -> None:
    (liked,) = opened.stage.feedback.rewards
    config = dataclasses.replace(opened.stage.feedback, rewards=(dataclasses.replace(liked, **change),), guards=None)
    with pytest.raises(UserError) as raised:
        opened.kind.check(opened.run, dataclasses.replace(opened.stage, feedback=config), ["distilled"])
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_prompts_of_ones_own_are_watched(opened: Opened, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    guards = GuardConfig(images=8, prompts=str(file), judges=(JudgeConfig(name="bright", path="judge"),))
    config = dataclasses.replace(opened.stage.feedback, guards=guards)
    with pytest.raises(UserError, match=r"stages\.liked\.feedback\.guards\.prompts: .*prompts.txt: cannot be read"):
        opened.kind.check(opened.run, dataclasses.replace(opened.stage, feedback=config), ["distilled"])
    file.write_text("a tower\n\n  a boat \nsnow\n", encoding="utf-8")
    assert rewards.fixed_prompts(opened.run, guards) == (["a tower", "a boat", "snow"], 3)


def test_a_stage_without_a_student_is_refused(opened: Opened) -> None:
    with pytest.raises(
        UserError, match=r"stages\.liked: kind=feedback needs a student to train on: a stage before it, or lora"
    ):
        opened.kind.check(opened.run, opened.stage, [])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("feedback.rewards=[]", "rewards must name at least one reward"),
        ("late_steps=3", "late_steps must lie in 1..2, not 3"),
        ("redraws=-1", "redraws must not be negative, and go with late_steps=1"),
        ("eta=0.5", "eta must be 0 with kind=feedback"),
        ("student=unet", "student"),
        (
            "feedback.guards.judges=[{name: bright, path: x}]",
            "guards.judges.0: bright is trained on, so it cannot judge",
        ),
        ("anchor={solver_steps: 5, k: 2}", "solver_steps (5) must be a multiple of k (2)"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as raised:
        recipe(tmp_path, tmp_path, STAGE, f"stages.liked.{override}")
    assert line in str(raised.value)


def test_the_embedded_scorer_judges_its_own_training(tmp_path: Path) -> None:
    change = "stages.liked.feedback.rewards=[{name: embedded:reward}]"
    (stage,) = recipe(tmp_path, tmp_path, STAGE, change).stages
    assert isinstance(stage, FeedbackStage)
    assert stage.feedback.guards is not None
    assert stage.feedback.guards.judges == (JudgeConfig(name="embedded:report"), JudgeConfig(name="embedded:pixels"))
