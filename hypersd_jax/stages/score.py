"""The stage of score distillation: student, fake-score model and heads around one frozen UNet (`method` 3 and 7).

Real score: the guided base. Fake score: the base under a LoRA of its own. Student: the base under its LoRA, or a whole
UNet of its own. A round is ``fake_updates`` updates of the fake model (and the heads on its features), then one of the
student.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.adapters import Adapter, join
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import BASE, ScoreStage
from hypersd_jax.diffusion import Schedule, move, solver_table
from hypersd_jax.distill import (
    Drawn,
    Sample,
    again,
    batch_mean,
    below,
    columns,
    consistency_loss,
    draw_trajectory,
    endpoint,
    fake_loss,
    generator_loss,
    matching_loss,
    mse,
    noised,
    student_sample,
)
from hypersd_jax.errors import UserError
from hypersd_jax.stages.judging import Judge, JudgeKind, heads_loss, judge_controls, judge_kind
from hypersd_jax.stages.loop import optimizer_config
from hypersd_jax.stages.networks import Networks, Predict, broadcast
from hypersd_jax.stages.pairs import Lead
from hypersd_jax.stages.tscd import HEADS, STUDENT, segments_of, teacher_controls, teacher_of
from hypersd_jax.training import Controls, Turn, optimizer_controls
from hypersd_jax.weights.components import Components

FAKE = "fake"
# What the step's key is folded with for the anchor's draws and for the noise of the real side.
ANCHOR_STREAM, REAL_STREAM = 2**32 - 3, 2**32 - 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreKind:
    """What is compiled into a round; stages of the same kind share it.

    ``regression`` and ``anchor`` say whether their teacher is the base, not a student; ``path`` whether the regression
    has that term, ``pairs`` whether the batch brings noise and end along.
    """

    deterministic: bool
    whole: bool
    steps: int
    guided: bool
    has_fake: bool
    fake_updates: int
    regression: tuple[bool, int] | None
    path: bool
    pairs: bool
    anchor: bool | None
    adversarial: JudgeKind | None
    data_free: bool
    accumulate: int
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float


def score_kind(stage: ScoreStage) -> ScoreKind:
    """The compiled part of a stage."""
    return ScoreKind(
        deterministic=stage.kind == "tdm",
        whole=stage.student == "unet",
        steps=len(stage.times),
        guided=stage.guidance > 1.0,
        has_fake=stage.has_fake,
        fake_updates=stage.fake_updates,
        regression=(stage.regression.teacher == BASE, stage.regression.steps) if stage.regression else None,
        path=stage.regression is not None and stage.regression.path_weight > 0,
        pairs=stage.regression is not None and stage.regression.pairs > 0,
        anchor=stage.anchor.teacher == BASE if stage.anchor else None,
        adversarial=judge_kind(stage.adversarial),
        data_free=stage.data_free,
        accumulate=stage.accumulate,
        beta1=stage.beta1,
        beta2=stage.beta2,
        weight_decay=stage.weight_decay,
        clip_norm=stage.clip_norm,
    )


def score_controls(stage: ScoreStage, schedule: Schedule, scheduler_config: dict[str, Any], grid: int) -> Controls:
    """The arrays that steer a stage; ``grid`` is the longest solver grid of the run."""
    last = schedule.num_train_timesteps - 1
    bounds = _times(stage.time_range, last)
    config = optimizer_config(stage)
    own = optimizer_controls(config, stage.updates)
    controls: Controls = {
        "ema_decay": np.asarray(stage.ema, np.float32),
        "times": np.asarray(stage.times, np.int32),
        "bounds": bounds,
        "fake_bounds": bounds if stage.kind == "tdm" else np.asarray([0, last], np.int32),
        "guidance": np.asarray(stage.guidance, np.float32),
        "weight": np.asarray(stage.weight, np.float32),
        "players": {STUDENT: own},
    }
    if stage.has_fake:
        fake = dataclasses.replace(config, learning_rate=stage.fake_learning_rate)
        controls["players"][FAKE] = optimizer_controls(fake, stage.updates)
    if stage.regression:
        with _naming("regression"):
            table = solver_table("ddim", stage.regression.steps, eta=0.0, scheduler_config=scheduler_config)
        controls["regression_weight"] = np.asarray(stage.regression.weight, np.float32)
        controls["regression_times"] = np.asarray(table["timesteps"], np.int32)
        controls["path_weight"] = np.asarray(stage.regression.path_weight, np.float32)
        controls["path_bounds"] = _times(stage.regression.path_range, last)
    if stage.anchor:
        controls["anchor_weight"] = np.asarray(stage.anchor.weight, np.float32)
        guidance = (stage.guidance, stage.guidance)
        with _naming("anchor"):
            controls |= teacher_controls(guidance, stage.anchor.solver_steps, 1, schedule, grid)
        controls["offset_noise"] = np.asarray(0.0, np.float32)
    if stage.adversarial:
        controls |= judge_controls(stage.adversarial)
        heads = dataclasses.replace(config, learning_rate=stage.adversarial.learning_rate)
        controls["players"][HEADS] = optimizer_controls(heads, stage.updates)
    return controls


def _times(shares: tuple[float, float], last: int) -> np.ndarray:
    """A range of training times (2,) int32 from shares of the last one."""
    return np.asarray([round(share * last) for share in shares], np.int32)


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """A `UserError` from within begins with the key."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}.{error}") from None


def score_frozen(
    components: Components, uncond: Conditioning, scales: Any, teachers: dict[str, Adapter | None]
) -> dict[str, Any]:
    """What a round reads and never changes; ``teachers``: LoRAs of "regression" and "anchor", where they have one."""
    shared = {"unet": dict(components.params["unet"]), "uncond": uncond, "scales": scales}
    return {**shared, **{name: teachers.get(name) or {} for name in ("regression", "anchor")}}


def make_score_turns(
    components: Components, schedule: Schedule, kind: ScoreKind, judge: Judge | None, latent_shape: tuple[int, ...]
) -> list[Turn]:
    """The turns of a round; ``latent_shape`` (h, w, C) is of the student's samples where no pictures give it."""
    stage = _Losses(components, schedule, kind, judge, latent_shape)
    beside = (FAKE, HEADS) if judge is not None else (FAKE,)
    student = Turn(players=(STUDENT,), loss=stage.student)
    if not kind.has_fake:
        return [student]
    return [Turn(players=beside, loss=stage.beside, repeat=kind.fake_updates), student]


def make_lead(
    components: Components, schedule: Schedule, kind: ScoreKind, controls: Controls, latent_shape: tuple[int, ...]
) -> Lead:
    """Where the regression's teacher leads, for pairs that are computed before the rounds."""
    losses = _Losses(components, schedule, kind, None, latent_shape)

    def lead(frozen: Any, noise: jax.Array, cond: Conditioning) -> jax.Array:
        nets = Networks(components=components, base=frozen["unet"])
        return losses.lead(nets, frozen, noise, cond, controls)[0]

    return lead


@dataclasses.dataclass(frozen=True)
class _Losses:
    """Both turns' losses."""

    components: Components
    schedule: Schedule
    kind: ScoreKind
    judge: Judge | None
    latent_shape: tuple[int, ...]

    def beside(
        self, trainable: Any, ema: Any, frozen: Any, batch: Any, key: jax.Array, controls: Controls
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Of the fake-score model, and of the heads on its features."""
        nets = Networks(components=self.components, base=frozen["unet"])
        still = self._predictor(nets, jax.lax.stop_gradient(trainable[STUDENT]), frozen, counted=False)
        drawn, sample = self._sample(still, still, batch, key, controls, controls["fake_bounds"])
        x_t, t, b = noised(sample, drawn, self.schedule)
        x_t, cond = jax.lax.stop_gradient(x_t), batch["cond"]
        fake = join(trainable[FAKE], frozen["scales"])
        taps = self.judge.taps if self.judge else ()
        output, features = nets.tapped(x_t, t, cond, taps, fake)
        loss = fake_loss(output, x_t, t, b, drawn.eps, schedule=self.schedule)
        metrics = {"fake_mse": loss}
        if self.judge is not None:
            real_t = self._real(batch, key, t)
            seen = nets.features(real_t, t, cond, taps, fake)
            bumped = None
            if self.judge.kind.r1:
                noise = _normal(jax.random.fold_in(key, REAL_STREAM - 1), batch["places"], real_t.shape[1:])
                bumped = nets.features(real_t + controls["r1_sigma"] * noise, t, cond, taps, fake)
            own, more = heads_loss(self.judge, trainable[HEADS], seen, features, bumped, controls)
            loss, metrics = loss + own, metrics | more
        calls = nets.calls + drawn.step + 1.0
        return loss, {**metrics, "fake_unet_calls": calls * self.kind.fake_updates}

    def student(
        self, trainable: Any, ema: Any, frozen: Any, batch: Any, key: jax.Array, controls: Controls
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Of the student."""
        nets = Networks(components=self.components, base=frozen["unet"])
        student = self._predictor(nets, trainable[STUDENT], frozen)
        still = self._predictor(nets, jax.lax.stop_gradient(trainable[STUDENT]), frozen, counted=False)
        drawn, sample = self._sample(student, still, batch, key, controls, controls["bounds"], batch.get("noise"))
        loss, metrics = jnp.float32(0.0), dict[str, jax.Array]()
        if self.kind.has_fake:
            loss, metrics = self._matching(nets, trainable, frozen, batch["cond"], drawn, sample, controls)
        calls = drawn.step.astype(jnp.float32)
        if self.kind.regression is not None:
            own, more, unseen = self._regression(nets, student, frozen, batch, drawn, sample, controls)
            loss, metrics, calls = loss + own, metrics | more, calls + unseen
        if self.kind.anchor is not None:
            anchor, more = self._anchor(nets, student, ema, frozen, batch, sample.x0, key, controls)
            metrics["anchor"] = anchor
            calls += more["target_calls"]
            loss = loss + controls["anchor_weight"] * anchor
        return loss, {**metrics, "unet_calls": calls + nets.calls}

    def _matching(
        self,
        nets: Networks,
        trainable: Any,
        frozen: Any,
        cond: Conditioning,
        drawn: Drawn,
        sample: Sample,
        controls: Controls,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The difference of the two scores, and what the heads say of the sample."""
        x_t, t, _ = noised(sample, drawn, self.schedule)
        seen_t = jax.lax.stop_gradient(x_t)
        real = self._real_score(nets, frozen, controls)(seen_t, t, cond)
        fake = join(trainable[FAKE], frozen["scales"])
        taps = self.judge.taps if self.judge else ()
        # The features carry the student's gradient; the score does not, and is stopped in the loss.
        output, features = nets.tapped(x_t if taps else seen_t, t, cond, taps, fake)
        matching, metrics = matching_loss(sample, x_t, t, real, output, schedule=self.schedule)
        loss = controls["weight"] * matching
        if self.judge is not None:
            logits = self.judge.logits(trainable[HEADS], features)
            metrics["generator"] = generator_loss(self.judge.kind.loss, logits)
            loss = loss + controls["adversarial_weight"] * metrics["generator"]
        return loss, metrics

    def lead(
        self, nets: Networks, frozen: Any, noise: jax.Array, cond: Conditioning, controls: Controls
    ) -> tuple[jax.Array, float]:
        """The regression's target, without gradient, and the calls that the trace did not see."""
        assert self.kind.regression is not None
        from_base, steps = self.kind.regression
        model = self._real_score(nets, frozen, controls) if from_base else nets.predictor(frozen["regression"])
        before = nets.calls
        end = endpoint(model, noise, cond, jnp.asarray(controls["regression_times"]), schedule=self.schedule)
        # The trace sees the body of the trajectory's loop, not each of its rounds.
        return end, steps * (2.0 if from_base and self.kind.guided else 1.0) - (nets.calls - before)

    def _regression(
        self,
        nets: Networks,
        student: Predict,
        frozen: Any,
        batch: Any,
        drawn: Drawn,
        sample: Sample,
        controls: Controls,
    ) -> tuple[jax.Array, dict[str, jax.Array], float]:
        """The distance to the many-step endpoint, its metrics, and the calls that the trace did not see."""
        cond = batch["cond"]
        end, unseen = (batch["end"], 0.0) if self.kind.pairs else self.lead(nets, frozen, drawn.noise, cond, controls)
        metrics = {"regression": batch_mean(mse(sample.x0, end))}
        loss = controls["regression_weight"] * metrics["regression"]

        if self.kind.path:
            low, high = controls["path_bounds"]
            t = low + below(drawn.uniform, high - low + 1)
            x0 = again(student, sample, drawn.noise, cond, controls["times"][0], t, schedule=self.schedule)
            metrics["path"] = batch_mean(mse(x0, end))
            loss = loss + controls["path_weight"] * metrics["path"]
        return loss, metrics, unseen

    def _anchor(
        self,
        nets: Networks,
        student: Predict,
        ema: Any,
        frozen: Any,
        batch: Any,
        x0: jax.Array,
        key: jax.Array,
        controls: Controls,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """TSCD's loss of one segment on the pictures' latents, or on the student's own samples."""
        latents = jax.lax.stop_gradient(x0) if self.kind.data_free else batch["latents"]
        rows = {**batch, "latents": latents, "uncond": broadcast(frozen["uncond"], batch["cond"])}
        return consistency_loss(
            "tscd",
            student,
            self._predictor(nets, ema[STUDENT], frozen, counted=False),
            teacher_of(nets, not self.kind.anchor, self.kind.guided, frozen["anchor"]),
            rows,
            jax.random.fold_in(key, ANCHOR_STREAM),
            segments_of(controls),
            controls,
            schedule=self.schedule,
            indices=batch["places"],
        )

    def _sample(
        self,
        student: Predict,
        still: Predict,
        batch: Any,
        key: jax.Array,
        controls: Controls,
        bounds: Any,
        noise: jax.Array | None = None,
    ) -> Any:
        """Draws and sample, which starts from ``noise`` where it is given."""
        shape = (batch["places"].shape[0], *self._latents(batch))
        drawn = draw_trajectory(key, shape, self.kind.steps, batch["places"])
        if noise is not None:
            drawn = drawn._replace(noise=noise)
        times = jnp.asarray(controls["times"])
        sample = student_sample(
            student,
            still,
            batch["cond"],
            drawn,
            times,
            jnp.asarray(bounds),
            schedule=self.schedule,
            deterministic=self.kind.deterministic,
        )
        return drawn, sample

    def _latents(self, batch: Any) -> tuple[int, ...]:
        return self.latent_shape if self.kind.data_free else batch["latents"].shape[1:]

    def _predictor(self, nets: Networks, weights: Any, frozen: Any, *, counted: bool = True) -> Predict:
        """The student: whole weights, or factors of its LoRA."""
        if self.kind.whole:
            return nets.predictor(params=weights, counted=counted)
        return nets.predictor(join(weights, frozen["scales"]), counted=counted)

    def _real_score(self, nets: Networks, frozen: Any, controls: Controls) -> Predict:
        if not self.kind.guided:
            return nets.predictor()

        def predict(x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
            guidance = jnp.broadcast_to(controls["guidance"], t.shape)
            return nets.guided(x, t, cond, broadcast(frozen["uncond"], cond), guidance)

        return predict

    def _real(self, batch: Any, key: jax.Array, t: jax.Array) -> jax.Array:
        """The pictures' latents noised to t (B,)."""
        latents = batch["latents"]
        noise = _normal(jax.random.fold_in(key, REAL_STREAM), batch["places"], latents.shape[1:])
        return move(latents, noise, *columns(self.schedule, t, latents))


def _normal(key: jax.Array, places: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise (B, ...) by (key, place) alone."""
    return jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key, place), shape))(places)
