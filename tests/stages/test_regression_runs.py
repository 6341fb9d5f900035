"""The regression without a fake-score model, on latents and on the frozen base's features: a first round by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.distill import draw_trajectory
from hypersd_jax.stages import run as stage_run
from hypersd_jax.stages import score
from hypersd_jax.stages.tscd import STUDENT
from tests.helpers.score_runs import (
    MIDDLE,
    TOLERANCE,
    ByHand,
    Opened,
    Round,
    below,
    counted,
    open_stage,
    recipe,
    relative_error,
    same_bits,
    smaller,
)
from tests.helpers.tiny_model import tiny_model

TAPS = ("down_blocks.0", MIDDLE)
STAGE = """
  - {name: one, kind: dmd, updates: 1, batch_size: 4, learning_rate: 1.0e-2, weight: 0.0,
     regression: {steps: 2, weight: 0.2, feature_weight: 0.7, feature_range: [0.1, 0.6], path_weight: 0.3,
                  path_range: [0.2, 0.8], teacher: early}}
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("regression")
    return open_stage(recipe(folder, smaller(tiny_model(folder / "model")), STAGE), "early", "late")


@pytest.fixture(scope="module")
def first(opened: Opened) -> Round:
    return opened.round()


@pytest.fixture(scope="module")
def hand(opened: Opened) -> ByHand:
    return ByHand(opened, TAPS)


def _draws(opened: Opened, hand: ByHand) -> tuple[Any, np.ndarray, np.ndarray]:
    """What the round draws; where the teacher leads; the times that both sides are noised to."""
    drawn = draw_trajectory(opened.key(0), hand.shape, 1, hand.rows["places"])
    teacher, x = hand.adapter(opened.students["early"]), np.asarray(drawn.noise, np.float64)
    for time, following in ((999, 499), (499, 499)):
        eps = hand.unet(x, time, teacher)[0]
        end = hand.clean(x, eps, time)
        x = hand.noise(end, eps, following)
    return drawn, end, 100 + below(drawn.uniform, 500)


def _feature_distance(hand: ByHand, x0: Any, end: Any, eps: Any, t: np.ndarray) -> float:
    sides = [hand.unet(hand.noise(x, np.asarray(eps), t), t)[1] for x in (x0, end)]
    found = []
    for tap in TAPS:
        one, other = (np.asarray(side[tap], np.float64) for side in sides)
        one, other = (side / np.linalg.norm(side, axis=-1, keepdims=True) for side in (one, other))
        found.append(((one - other) ** 2).sum(-1).mean())
    return float(np.mean(found))


def test_its_losses_by_hand(opened: Opened, first: Round, hand: ByHand) -> None:
    drawn, end, t = _draws(opened, hand)
    noise = np.asarray(drawn.noise, np.float64)
    x0 = hand.clean(noise, hand.unet(noise, 999, hand.adapter(opened.start))[0], 999)
    regression = np.mean((x0 - end) ** 2)
    assert regression == pytest.approx(first.metrics["regression"], rel=TOLERANCE)
    features = _feature_distance(hand, x0, end, drawn.eps, t)
    assert features == pytest.approx(first.metrics["features"], rel=TOLERANCE)
    # Again, from where a DDIM move along that estimate leads.
    times, student = 200 + below(drawn.uniform, 600), hand.adapter(opened.start)
    x_t = hand.ddim(noise, hand.unet(noise, 999, student)[0], 999, times)
    path = np.mean((hand.clean(x_t, hand.unet(x_t, times, student)[0], times) - end) ** 2)
    assert path == pytest.approx(first.metrics["path"], rel=TOLERANCE)
    assert 0.2 * regression + 0.7 * features + 0.3 * path == pytest.approx(first.metrics["loss"], rel=TOLERANCE)
    assert "score_gap" not in first.metrics


def test_the_features_gradient_reaches_the_student(opened: Opened, hand: ByHand) -> None:
    """The term alone, by differentiating it directly: through the frozen base's features, not those of the target."""
    alone = opened.round(regression_weight=0.0, feature_weight=1.0, path_weight=0.0)
    drawn, end, t = _draws(opened, hand)
    a, s, last, deviation = (jnp.asarray(v, jnp.float32) for v in (*hand.at(t), *hand.at(999)))
    network, params = opened.run.pipe.components.unet, dict(opened.run.pipe.components.params["unet"])

    def term(start: Any) -> jax.Array:
        def unet(*given: Any, **more: Any) -> Any:
            return network(params, *given, hand.cond.context, **more)

        eps = unet(drawn.noise, jnp.full(4, 999), adapter=hand.adapter(start))
        sides = [(drawn.noise - deviation * eps) / last, jnp.asarray(end, jnp.float32)]
        one, other = (unet(a * side + s * drawn.eps, t, taps=TAPS)[1] for side in sides)
        cosines = [
            jnp.sum(one[tap] * other[tap], -1)
            / jnp.linalg.norm(one[tap], axis=-1)
            / jnp.linalg.norm(other[tap], axis=-1)
            for tap in TAPS
        ]
        return jnp.mean(jnp.stack([jnp.mean(2 - 2 * cosine) for cosine in cosines]))

    value, wanted = jax.jit(jax.value_and_grad(term))(opened.start)
    assert alone.metrics["loss"] == pytest.approx(float(value), rel=TOLERANCE)
    found = alone.gradient(STUDENT, clip_norm=opened.stage.clip_norm, beta1=opened.stage.beta1)
    assert relative_error(found, wanted) < TOLERANCE


def test_no_fake_model_is_made_or_called(opened: Opened, first: Round) -> None:
    assert first.after.trainable.keys() == first.after.opt_state.keys() == first.after.ema.keys() == {STUDENT}
    kind, run = score.score_kind(opened.stage), opened.run

    def turn(parts: Any) -> Any:
        (only,) = score.make_score_turns(parts, run.pipe.schedule, kind, None, run.latent_shape)
        return only

    ((calls, whole, half),) = counted(opened, turn, [opened.key(0)])
    # The student twice and the teacher's two steps, and two calls that end at the middle block.
    assert calls == {"unet_calls": 5.0}
    assert (whole, half) == (4, 2)


def test_it_runs(opened: Opened) -> None:
    stage_run.run_stage(opened.run, 0, opened.stage, opened.start, opened.students)
    assert (opened.run.output.loras / "one.safetensors").is_file()


# MARK: pairs that are computed once

PAIRS = """
  - {name: one, kind: dmd, updates: 6, batch_size: 4, accumulate: 2, learning_rate: 1.0e-2, guidance: 30.0,
     fake_updates: 1, regression: {steps: 2, weight: 0.2, pairs: 8, teacher: base}}
"""


def test_pairs_are_gone_over_again(tmp_path: Path, opened: Opened) -> None:
    """Two batches serve six updates, in orders of their own; a run that goes on sees the same ones."""
    model = opened.run.config.model.source
    pair = open_stage(recipe(tmp_path, Path(model), PAIRS))
    feed = stage_run._pairs(pair.run, 0, pair.stage, pair.job)
    assert feed is not None
    fed = list(feed(0))
    assert [each.number for each in fed] == [1, 2, 3, 4, 5, 6]
    for first in (0, 2, 4):
        assert fed[first].batch is not fed[first + 1].batch
        assert {id(fed[first + i].batch) for i in (0, 1)} == {id(fed[i].batch) for i in (0, 1)}
    again = list(feed(3))
    assert [each.number for each in again] == [4, 5, 6]
    for one, other in zip(again, fed[3:], strict=True):
        same_bits(one.batch, other.batch)

    plain = [batch for _, batch, _ in stage_run._batches(pair.run, 0, pair.stage, 0)]
    kept = sorted((each.batch for each in fed[:2]), key=lambda batch: not np.array_equal(*_latents(batch, plain[0])))
    noises = np.stack([np.asarray(batch["noise"]) for batch in kept]).reshape(8, -1)
    assert len(np.unique(noises, axis=0)) == 8
    for batch, expected in zip(kept, plain, strict=False):
        same_bits({name: batch[name] for name in expected}, expected)
        for micro in range(2):
            rows = jax.tree.map(lambda leaf, micro=micro: np.asarray(leaf)[micro], batch)
            pair.__dict__["rows"] = rows
            hand = ByHand(pair)
            x = rows["noise"].astype(np.float64)
            for time, following in ((999, 499), (499, 499)):
                eps = hand.guided(x, time, 30.0)
                end = hand.clean(x, eps, time)
                x = hand.noise(end, eps, following)
            np.testing.assert_allclose(rows["end"], end, rtol=1e-3, atol=1e-3)

    job = pair.job
    before = jax.device_get(job.state)
    _, metrics = job.make()(job.state, job.frozen, fed[0].batch, pair.key(0), job.controls)
    alpha, sigma = (float(each[0, 0, 0, 0]) for each in hand.at(999))
    expected = []
    for micro in range(2):
        hand.cond = jax.tree.map(lambda leaf, micro=micro: leaf[micro], fed[0].batch["cond"])
        noise, end = (np.asarray(fed[0].batch[name])[micro] for name in ("noise", "end"))
        eps = hand.unet(noise, 999, hand.adapter(before.trainable[STUDENT]))[0]
        expected.append(np.mean(((noise - sigma * eps) / alpha - end) ** 2))
    assert float(metrics["regression"]) == pytest.approx(np.mean(expected), rel=TOLERANCE)
    # The student; guidance and the fake model: the target costs no call.
    assert float(metrics["unet_calls"]) == 4.0


def _latents(*batches: Any) -> list[np.ndarray]:
    return [np.asarray(batch["latents"]) for batch in batches]
