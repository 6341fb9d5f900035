"""Rounds of several players: arithmetic, who moves and who stands still, the guard, averages, randomness, resuming."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypersd_jax import training
from hypersd_jax.training import Turn
from tests.helpers import toy_training as toy

MESH = training.make_mesh(1, 1)
REPEAT = 3
# The critic's clipping bites at every update, the head's at none: clipped as one tree both would differ.
CONFIGS = {
    "student": toy.CONFIG,
    "critic": training.OptimizerConfig(learning_rate=3e-3, clip_norm=0.05),
    "head": training.OptimizerConfig(learning_rate=2e-2, schedule="linear", clip_norm=1e3, weight_decay=0.1),
}
OPTIMIZERS = {name: training.make_optimizer(config) for name, config in CONFIGS.items()}
EVERYWHERE = np.asarray([-np.inf, np.inf], np.float32)


def players():
    """``age`` falls with every update of the critic, so that a loss can tell the repetitions apart."""
    draw = np.random.default_rng(5)
    return {
        "student": toy.trainable(),
        "critic": {"kernel": draw.standard_normal((toy.FEATURES, 1), np.float32), "age": np.zeros(1, "f")},
        "head": {"gain": np.ones((1, 1), "f"), "bias": np.full((1, 1), 0.2, "f")},
    }


def noisy(batch, key, controls):
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch["place"])
    return batch["x"] + controls["jitter"] * jax.vmap(lambda k: jax.random.normal(k, batch["x"].shape[1:]))(keys)


def beside(trainable, ema, frozen, batch, key, controls):
    """Critic and head follow the student; infinite, its gradient finite, while the age is out of controls["ages"]."""
    x, critic, head = noisy(batch, key, controls), trainable["critic"], trainable["head"]
    error = x @ critic["kernel"] - jax.lax.stop_gradient(toy.predict(trainable["student"], frozen, x))
    judged = head["gain"] * error + head["bias"] - batch["y"]
    age = jax.lax.stop_gradient(critic["age"][0])
    low, high = controls["ages"]
    value = jnp.mean(jnp.square(error)) + jnp.mean(jnp.square(judged)) + critic["age"][0]
    return jnp.where((low <= age) & (age <= high), value, value + jnp.inf), {"gap": jnp.mean(jnp.abs(error))}


def student(trainable, ema, frozen, batch, key, controls):
    """The toy's own loss, and a pull to the critic."""
    value, metrics = toy.loss(trainable["student"], ema["student"], frozen, batch, key, controls)
    pull = toy.predict(trainable["student"], frozen, batch["x"]) - batch["x"] @ trainable["critic"]["kernel"]
    return value + 0.3 * jnp.mean(jnp.square(pull)) + jnp.log(controls["sound"]), metrics


TURNS = (Turn(players=("critic", "head"), loss=beside, repeat=REPEAT), Turn(players=("student",), loss=student))


def fresh(averaged=("student",)):
    return training.init_players(players(), OPTIMIZERS, averaged=averaged, mesh=MESH)


def controls(**settings):
    """``sound``: the student's loss is infinite at 0 and not a number below, its gradient finite all the same."""
    by_player = {name: training.optimizer_controls(config, 10) for name, config in CONFIGS.items()}
    values = {"ema_decay": 0.9, "jitter": 0.1, "sound": 1.0, "ages": EVERYWHERE, **settings}
    return {"players": by_player, **{name: np.asarray(value, np.float32) for name, value in values.items()}}


@functools.cache
def compiled(turns=TURNS, accumulate=1):
    state = jax.eval_shape(lambda: training.init_players(players(), OPTIMIZERS, averaged=("student",)))
    return training.make_round(
        turns, OPTIMIZERS, state, toy.frozen(), mesh=MESH, accumulate=accumulate, compiler_options=toy.QUICK
    )


def go(state, rounds, step=None, accumulate=1, **settings):
    """The state after some rounds, and their metrics."""
    step, steering, history = step or compiled(accumulate=accumulate), controls(**settings), []
    for _ in range(rounds):
        data = toy.batch(int(state.step), accumulate=accumulate)
        state, metrics = step(state, toy.frozen(), data, jax.random.key(7), steering)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def each_leaf(first, second):
    return zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)


def test_two_rounds_equal_the_same_written_by_hand():
    state, history = go(fresh(), 2)
    steering = controls()
    weights, ema = players(), {"student": players()["student"]}
    reference = {
        "student": optax.chain(
            optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(toy.CONFIG.weight_decay)
        ),
        "critic": optax.chain(optax.clip_by_global_norm(0.05), optax.scale_by_adam()),
        "head": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
    }
    moments = {name: tx.init(weights[name]) for name, tx in reference.items()}
    turns = [(("critic", "head"), beside, REPEAT), (("student",), student, 1)]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def differentiate(loss, names, weights, ema, rows, key):
        def of(active):
            return loss({**weights, **active}, ema, toy.frozen(), rows, key, steering)

        return jax.value_and_grad(of, has_aux=True)({name: weights[name] for name in names})

    for step in range(2):
        rows = jax.tree.map(lambda leaf: leaf[0], toy.batch(step))
        key = jax.random.fold_in(jax.random.key(7), step)
        logged = {}
        for turn, (names, loss, repeat) in enumerate(turns):
            for time in range(repeat):
                here = jax.random.fold_in(jax.random.fold_in(key, turn), time)
                (value, metrics), grads = differentiate(loss, names, weights, ema, rows, here)
                logged |= metrics | {"loss": value}
                for name in names:
                    rate = training.learning_rate_at(steering["players"][name], step)
                    directions, moments[name] = reference[name].update(grads[name], moments[name], weights[name])
                    updates = jax.tree.map(lambda leaf: -rate * leaf, directions)  # noqa: B023
                    weights = {**weights, name: optax.apply_updates(weights[name], updates)}
                    logged[f"{name}_grad_norm"] = optax.tree.norm(grads[name])
        ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, ema, {"student": weights["student"]})
        logged |= {"grad_norm": logged.pop("student_grad_norm"), "update_norm": optax.tree.norm(updates), "lr": rate}
        logged |= {"param_norm": optax.tree.norm(weights["student"]), "skipped": 0}
        assert history[step] == pytest.approx({name: float(value) for name, value in logged.items()}, rel=2e-5)
    for ours, theirs in ((state.trainable, weights), (state.ema, ema), (state.opt_state, moments)):
        for a, b in each_leaf(ours, theirs):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)
    assert int(state.step) == 2
    assert history[0]["critic_grad_norm"] > 0.05  # clipped
    assert [int(state.opt_state[name][1].count) for name in ("critic", "student")] == [2 * REPEAT, 2]


def test_a_player_that_has_no_turn_stands_still_to_the_bit():
    """Weight decay and moments too; in the whole round nobody does."""
    before = jax.device_get(fresh())
    alone, _ = go(fresh(), 2, compiled(TURNS[1:]))
    others, _ = go(fresh(), 2, compiled(TURNS[:1]))
    for state, still, moved in ((alone, ("critic", "head"), ("student",)), (others, ("student",), ("critic", "head"))):
        for part in ("trainable", "opt_state"):
            old, new = getattr(before, part), getattr(state, part)
            toy.assert_same({name: old[name] for name in still}, {name: new[name] for name in still})
            assert all(np.any(a != b) for name in moved for a, b in each_leaf(old[name], new[name]))


def test_accumulated_gradients_equal_the_big_batch():
    """In every turn, noise included."""
    (whole, big), (pieces, small) = (go(fresh(), 2, accumulate=n) for n in (1, 4))
    for one, four in zip(big, small, strict=True):
        assert one == pytest.approx(four, rel=1e-4, abs=1e-6)
    for a, b in each_leaf(whole.trainable, pieces.trainable):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(
    ("low", "high", "sound"),
    [
        (-np.inf, -1e-4, 1.0),  # the first repetition of the first turn alone
        (-1.5 * 3e-3, np.inf, 1.0),  # its last one alone
        (-np.inf, np.inf, 0.0),  # the last turn, after the others' good updates
        (-np.inf, np.inf, -1.0),
    ],
    ids=["first", "last", "student-infinite", "student-nan"],
)
def test_a_round_that_is_not_finite_anywhere_is_skipped_as_a_whole(low, high, sound):
    state, _ = go(fresh(), 2)
    before = jax.device_get(state)
    age = float(before.trainable["critic"]["age"][0])
    state, (metrics,) = go(state, 1, ages=[age + low, age + high], sound=sound)
    for part in ("trainable", "opt_state", "ema"):
        toy.assert_same(getattr(before, part), getattr(state, part))
    assert (int(state.step), int(state.skipped)) == (3, 1)
    assert (metrics["skipped"], metrics["update_norm"]) == (1, 0)
    state, (metrics,) = go(state, 1)
    assert np.isfinite(metrics["loss"])
    assert (int(state.step), int(state.skipped)) == (4, 1)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_skips_the_round_too():
    def steep(trainable, ema, frozen, batch, key, controls):
        return jnp.sum(jnp.sqrt(trainable["a"])) + jnp.sum(trainable["b"]), {}  # a: value 0, slope infinite

    def gentle(trainable, ema, frozen, batch, key, controls):
        return jnp.sum(jnp.square(trainable["b"])), {}

    turns = [Turn(players=("b", "a"), loss=steep), Turn(players=("b",), loss=gentle)]
    state, metrics = one_round(turns, {"a": jnp.zeros(3), "b": jnp.full(3, 2.0)})
    assert int(state.skipped) == 1
    assert float(metrics["loss"]) == 3  # of b = 1, after the first turn's update
    np.testing.assert_array_equal(state.trainable["a"], np.zeros(3))
    np.testing.assert_array_equal(state.trainable["b"], np.full(3, 2))


def one_round(turns, weights, seed=0):
    """One round of plain gradient descent at rate 1."""
    optimizers = {name: optax.identity() for name in weights}
    state = training.init_players(weights, optimizers, averaged=())
    step = training.make_round(turns, optimizers, state, {}, mesh=MESH)
    plain = training.optimizer_controls(training.OptimizerConfig(learning_rate=1.0), 10)
    steering = {"players": dict.fromkeys(weights, plain), "ema_decay": np.float32(0)}
    return step(state, {}, {"x": np.zeros((1, 2), np.float32)}, jax.random.key(seed), steering)


def test_repetitions_and_turns_draw_different_randomness():
    """The gradient is the noise itself, so that plain descent adds up what was drawn."""

    def walk(name):
        def loss(trainable, ema, frozen, batch, key, controls):
            noise = jax.random.normal(key, (4,))
            return -jnp.sum(noise * trainable[name]), {f"{name}_first": noise[0]}

        return loss

    turns = [Turn(players=("a",), loss=walk("a"), repeat=3), Turn(players=("b",), loss=walk("b"))]
    state, metrics = one_round(turns, {"a": jnp.zeros(4), "b": jnp.zeros(4)}, seed=3)
    streams = [(0, 0), (0, 1), (0, 2), (1, 0)]
    first = jax.random.fold_in(jax.random.key(3), 0)  # state.step is 0
    keys = [jax.random.fold_in(jax.random.fold_in(first, turn), time) for turn, time in streams]
    noise = np.stack([jax.random.normal(each, (4,)) for each in keys])
    assert len(np.unique(noise)) == noise.size
    np.testing.assert_allclose(state.trainable["a"], noise[:3].sum(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.trainable["b"], noise[3], rtol=1e-6)
    assert float(metrics["a_first"]) == pytest.approx(float(noise[2, 0]), rel=1e-6)  # the last repetition's


def test_a_turn_sees_what_the_turns_before_it_did():
    def follow(leader, follower):
        def loss(trainable, ema, frozen, batch, key, controls):
            return -jnp.sum(trainable[leader] * trainable[follower]), {}

        return Turn(players=(follower,), loss=loss)

    state, _ = one_round([follow("a", "b"), follow("b", "c")], {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)})
    assert [float(state.trainable[name][0]) for name in "abc"] == [1, 2, 3]


def test_only_the_averaged_players_have_an_average():
    state, _ = go(fresh(), 2, ema_decay=0.0)
    assert set(state.ema) == {"student"}
    toy.assert_same(state.ema["student"], state.trainable["student"])
    both = training.init_players(players(), OPTIMIZERS, averaged=("student", "head"))
    toy.assert_same(both.ema, {name: players()[name] for name in ("student", "head")})


def test_resuming_is_bit_identical(tmp_path):
    state, _ = go(fresh(), 2)
    like = training.abstract(MESH, state)
    with training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, {"stage": "dmd"})
        uninterrupted, _ = go(state, 2)
    with training.Checkpointer(tmp_path) as checkpointer:
        restored, facts = checkpointer.restore(None, like)
    assert facts == {"stage": "dmd"}
    assert set(restored.ema) == {"student"}
    assert int(restored.step) == 2
    again, _ = go(restored, 2)
    toy.assert_same(again, uninterrupted)


def test_the_metrics_names():
    _, (metrics,) = go(fresh(), 1)
    ours = {"loss", "grad_norm", "update_norm", "param_norm", "lr", "skipped", "critic_grad_norm", "head_grad_norm"}
    assert set(metrics) == ours | {"gap", "error", "drift"}
    assert metrics["lr"] == pytest.approx(0.5 * toy.CONFIG.learning_rate)  # the student's, in the first of two warm-ups


@pytest.mark.parametrize("name", ["lr", "param_norm", "b_grad_norm", "mine"])
def test_metrics_cannot_overwrite_each_other(name):
    def loss(trainable, ema, frozen, batch, key, controls):
        return jnp.sum(trainable["a"]) + jnp.sum(trainable["b"]), {name: jnp.float32(0)}

    def other(trainable, ema, frozen, batch, key, controls):
        return jnp.sum(trainable["a"]), {"mine": jnp.float32(0)}

    turns = [Turn(players=("b",), loss=other), Turn(players=("a",), loss=loss)]
    with pytest.raises(ValueError, match=name):
        one_round(turns, {"a": jnp.zeros(3), "b": jnp.zeros(3)})


def test_controls_do_not_recompile():
    step = compiled()
    state, _ = go(fresh(), 1)
    before = step._cache_size()
    go(state, 1, jitter=0.3, ema_decay=0.5)
    assert step._cache_size() == before


def test_the_callers_arrays_outlive_the_donation_of_the_state():
    mine = jax.tree.map(jnp.asarray, players())
    state = training.init_players(mine, OPTIMIZERS, averaged=("student",), mesh=MESH)
    go(state, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    toy.assert_same(mine, players())


def test_master_weights_must_be_float32():
    with pytest.raises(ValueError, match=r"\['b'\].*bfloat16"):
        training.init_players(
            {"a": jnp.zeros(3), "b": jnp.zeros(3, jnp.bfloat16)},
            {name: optax.identity() for name in "ab"},
            averaged=(),
        )
