"""The step on one device: arithmetic, accumulation, the guard against non-finite values, donation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypersd_jax import training
from tests.helpers import toy_training as toy


def test_three_steps_equal_the_same_written_by_hand():
    run = toy.Run()
    history = run.go(3)

    params = ema = toy.trainable()
    reference = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(1e-2))
    opt_state = reference.init(params)
    for step in range(3):
        key = jax.random.fold_in(run.key, step)
        rows = jax.tree.map(lambda leaf: leaf[0], toy.batch(step))
        (value, _), grads = jax.value_and_grad(toy.loss, has_aux=True)(
            params, ema, toy.frozen(), rows, key, run.controls
        )
        updates, opt_state = reference.update(grads, opt_state, params)
        lr = float(training.learning_rate_at(run.controls, step))
        updates = jax.tree.map(lambda leaf: -lr * leaf, updates)  # noqa: B023
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, ema, params)
        assert history[step]["loss"] == pytest.approx(float(value), rel=1e-5)
        assert history[step]["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
        assert history[step]["update_norm"] == pytest.approx(float(optax.tree.norm(updates)), rel=1e-5)
        assert history[step]["param_norm"] == pytest.approx(float(optax.tree.norm(params)), rel=1e-5)
        assert history[step]["lr"] == pytest.approx(lr, rel=1e-6)
    for ours, theirs in ((run.state.trainable, params), (run.state.ema, ema)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, theirs)
    assert int(run.state.step) == 3


def test_training_lowers_the_loss():
    config = training.OptimizerConfig(learning_rate=3e-2)
    history = toy.Run(config=config, rows=64, jitter=0.0).go(60)
    assert history[-1]["error"] < 0.6 * history[0]["error"]


def test_accumulated_gradient_equals_the_big_batch():
    """Noise included: rows are told apart by their place in the whole batch."""
    whole, pieces = (toy.Run(rows=16, accumulate=n) for n in (1, 4))
    for big, small in zip(whole.go(3), pieces.go(3), strict=True):
        assert big == pytest.approx(small, rel=1e-4, abs=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.state.trainable, pieces.state.trainable
    )


def test_ema_with_decay_zero_is_the_student():
    run = toy.Run(ema_decay=0.0)
    run.go(2)
    toy.assert_same(run.state.ema, run.state.trainable)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_step_changes_only_the_counters(poison):
    run = toy.Run()
    run.go(2)
    before = jax.device_get(run.state)
    jitter, run.controls["jitter"] = run.controls["jitter"], np.asarray(poison, np.float32)
    (metrics,) = run.go(1)
    after = jax.device_get(run.state)
    for part in ("trainable", "opt_state", "ema"):
        toy.assert_same(getattr(before, part), getattr(after, part))
    assert (int(after.step), int(after.skipped)) == (3, 1)
    assert metrics["skipped"] == 1
    assert metrics["update_norm"] == 0

    run.controls["jitter"] = jitter
    (metrics,) = run.go(1)
    assert np.isfinite(metrics["loss"])
    assert (int(run.state.step), int(run.state.skipped)) == (4, 1)


def test_a_non_finite_gradient_under_a_finite_loss_is_skipped_too():
    def loss(trainable, ema, frozen, batch, key, controls):
        return jnp.sum(jnp.sqrt(trainable)), {}  # value 0, slope infinite

    tx = training.make_optimizer(toy.CONFIG)
    state = training.init_state(jnp.zeros(3), tx)
    step = training.make_step(loss, tx, state, {}, mesh=training.make_mesh(1, 1))
    state, metrics = step(state, {}, {"x": np.zeros((1, 2), np.float32)}, jax.random.key(0), toy.controls())
    assert float(metrics["loss"]) == 0
    assert int(state.skipped) == 1
    np.testing.assert_array_equal(state.trainable, np.zeros(3))


def test_controls_do_not_recompile():
    run = toy.Run()
    run.go(1)
    before = run.step._cache_size()  # every run in this process shares the step
    other = training.OptimizerConfig(learning_rate=1.0, warmup_steps=9, schedule="linear", weight_decay=1e-2)
    run.controls = toy.controls(99, jitter=0.3, ema_decay=0.5, config=other)
    run.go(1)
    assert run.step._cache_size() == before


def test_the_state_is_donated_and_the_callers_arrays_are_not():
    mine = jax.tree.map(jnp.asarray, toy.trainable())
    tx = training.make_optimizer(toy.CONFIG)
    run = toy.Run()
    old = training.init_state(mine, tx, run.mesh)
    run.step(old, run.frozen, toy.batch(0), run.key, run.controls)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((mine, run.frozen)))


def test_own_metrics_cannot_be_overwritten():
    def loss(trainable, ema, frozen, batch, key, controls):
        return jnp.sum(trainable), {"lr": jnp.float32(0)}

    tx = training.make_optimizer(toy.CONFIG)
    state = training.init_state(jnp.zeros(3), tx)
    step = training.make_step(loss, tx, state, {}, mesh=training.make_mesh(1, 1))
    with pytest.raises(ValueError, match="lr"):
        step(state, {}, {"x": np.zeros((1, 2), np.float32)}, jax.random.key(0), toy.controls())


def test_master_weights_must_be_float32():
    with pytest.raises(ValueError, match="bfloat16"):
        training.init_state({"a": jnp.zeros(3, jnp.bfloat16)}, training.make_optimizer(toy.CONFIG))
