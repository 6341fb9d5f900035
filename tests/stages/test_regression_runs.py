"""The regression of score distillation, without a fake score model and from ODE pairs: first steps by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.distill import draw_trajectory
from hypersd_jax.stages import run as stage_run
from hypersd_jax.stages.generator import _batches
from hypersd_jax.stages.kinds import STUDENT
from tests.helpers.score_runs import (
    TOLERANCE,
    ByHand,
    Opened,
    Step,
    below,
    counted,
    open_stage,
    recipe,
    relative_error,
    same_bits,
)
from tests.helpers.tiny_model import smaller, tiny_model

STAGE = """
  - {name: one, kind: regression, updates: 1, batch_size: 4, learning_rate: 1.0e-2,
     regression: {steps: 2, weight: 0.2, path_weight: 0.3, path_range: [0.2, 0.8], teacher: early}}
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("regression")
    return open_stage(recipe(folder, smaller(tiny_model(folder / "model")), STAGE), "early", "late")


@pytest.fixture(scope="module")
def first(opened: Opened) -> Step:
    return opened.step()


@pytest.fixture(scope="module")
def hand(opened: Opened) -> ByHand:
    return ByHand(opened)


def _draws(opened: Opened, hand: ByHand) -> tuple[Any, np.ndarray, np.ndarray]:
    """Draw the first step's randomness; return it, the teacher's endpoints, and the second point's timesteps."""
    drawn = draw_trajectory(opened.key(0), hand.shape, 1, hand.batch["indices"])
    end = _rollout(hand, drawn.noise, lambda x, time: hand.unet(x, time, hand.adapter(opened.students["early"]))[0])
    return drawn, end, 200 + below(drawn.uniform, 600)


def _rollout(hand: ByHand, noise: Any, predict: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Take two DDIM steps to the endpoint."""
    noise = np.asarray(noise, np.float64)
    x = hand.ddim(noise, predict(noise, 999), 999, 499)
    return hand.clean(x, predict(x, 499), 499)


def test_its_losses_by_hand(opened: Opened, first: Step, hand: ByHand) -> None:
    drawn, end, times = _draws(opened, hand)
    noise = np.asarray(drawn.noise, np.float64)
    x0 = hand.clean(noise, hand.unet(noise, 999, hand.adapter(opened.start))[0], 999)
    regression = np.mean((x0 - end) ** 2)
    assert regression == pytest.approx(first.metrics["regression"], rel=TOLERANCE)
    # Again, from where a DDIM step along that estimate leads.
    student = hand.adapter(opened.start)
    x_t = hand.ddim(noise, hand.unet(noise, 999, student)[0], 999, times)
    path = np.mean((hand.clean(x_t, hand.unet(x_t, times, student)[0], times) - end) ** 2)
    assert path == pytest.approx(first.metrics["path"], rel=TOLERANCE)
    assert 0.2 * regression + 0.3 * path == pytest.approx(first.metrics["loss"], rel=TOLERANCE)
    assert "score_gap" not in first.metrics


def test_the_second_points_gradient(opened: Opened, hand: ByHand) -> None:
    """The term alone, by differentiating it directly: the step that led there has no gradient."""
    alone = opened.step(regression__weight=0.0, regression__path_weight=1.0)
    drawn, end, times = _draws(opened, hand)
    noise = np.asarray(drawn.noise, np.float64)
    x_t = hand.ddim(noise, hand.unet(noise, 999, hand.adapter(opened.start))[0], 999, times)
    a, s, given, target = (jnp.asarray(each, jnp.float32) for each in (*hand.at(times), x_t, end))
    network, params = opened.run.base.components.unet, dict(opened.run.base.params["unet"])

    def term(start: Any) -> jax.Array:
        eps = network(params, given, times, hand.cond.context, adapter=hand.adapter(start))
        return jnp.mean(((given - s * eps) / a - target) ** 2)

    value, wanted = jax.jit(jax.value_and_grad(term))(opened.start)
    assert alone.metrics["loss"] == pytest.approx(float(value), rel=TOLERANCE)
    found = alone.gradient(STUDENT, clip_norm=opened.stage.clip_norm, beta1=opened.stage.beta1)
    assert relative_error(found, wanted) < TOLERANCE


def test_no_fake_model_is_made_or_called(opened: Opened, first: Step) -> None:
    assert first.after.trainable.keys() == first.after.opt_state.keys() == first.after.ema.keys() == {STUDENT}
    ((calls, whole, half),) = counted(opened, 0, [opened.key(None)])
    # The student twice and the teacher's two steps.
    assert calls == {"calls": 4.0}
    assert (whole, half) == (4, 0)


def test_it_runs(opened: Opened) -> None:
    stage_run.run_stage(opened.run, 0, opened.stage)
    assert (opened.run.output.loras / "one.safetensors").is_file()


# MARK: ODE pairs that are computed once

PAIRS = """
  - {name: one, kind: regression, updates: 6, batch_size: 4, accumulate: 2, learning_rate: 1.0e-2,
     guidance: 30.0, regression: {steps: 2, weight: 0.2, pairs: 8, teacher: base}}
"""


def test_pairs_are_used_repeatedly(tmp_path: Path, opened: Opened) -> None:
    """Two batches serve six updates, in orders of their own; a resumed run sees the same ones."""
    model = opened.run.config.model.source
    pair = open_stage(recipe(tmp_path, Path(model), PAIRS))

    def load(done: int) -> Any:
        return pair.kind.batches(pair.run, 0, pair.stage, pair.frozen, done)

    loaded = list(load(0))
    assert [each.number for each in loaded] == [1, 2, 3, 4, 5, 6]
    for first in (0, 2, 4):
        assert loaded[first].batch is not loaded[first + 1].batch
        assert {id(loaded[first + i].batch) for i in (0, 1)} == {id(loaded[i].batch) for i in (0, 1)}
    again = list(load(3))
    assert [each.number for each in again] == [4, 5, 6]
    for one, other in zip(again, loaded[3:], strict=True):
        same_bits(one.batch, other.batch)

    plain = [batch for _, batch, _ in _batches(pair.run, 0, pair.stage, 0)]
    kept = sorted((each.batch for each in loaded[:2]), key=lambda batch: not np.array_equal(*_latents(batch, plain[0])))
    noises = np.stack([np.asarray(batch["noise"]) for batch in kept]).reshape(8, -1)
    assert len(np.unique(noises, axis=0)) == 8
    for batch, expected in zip(kept, plain, strict=False):
        same_bits({name: batch[name] for name in expected}, expected)
        for micro in range(2):
            micro_batch = jax.tree.map(lambda leaf, micro=micro: np.asarray(leaf)[micro], batch)
            pair.__dict__["batch"] = micro_batch
            hand = ByHand(pair)
            end = _rollout(hand, micro_batch["noise"], lambda x, time, hand=hand: hand.guided(x, time, 30.0))
            assert relative_error(micro_batch["endpoint"], end) < TOLERANCE

    state = pair.state()
    before = jax.device_get(state)
    _, metrics = pair.run.step(state, pair.frozen, loaded[0].batch, pair.key(0), pair.stage)
    alpha, sigma = (float(each[0, 0, 0, 0]) for each in hand.at(999))
    expected = []
    for micro in range(2):
        hand.cond = jax.tree.map(lambda leaf, micro=micro: leaf[micro], loaded[0].batch["cond"])
        noise, end = (np.asarray(loaded[0].batch[name])[micro] for name in ("noise", "endpoint"))
        eps = hand.unet(noise, 999, hand.adapter(before.trainable[STUDENT]))[0]
        expected.append(np.mean(((noise - sigma * eps) / alpha - end) ** 2))
    assert float(metrics["regression"]) == pytest.approx(np.mean(expected), rel=TOLERANCE)
    assert float(metrics["calls"]) == 1.0  # the student's; the target costs none


def _latents(*batches: Any) -> list[np.ndarray]:
    return [np.asarray(batch["latents"]) for batch in batches]
