"""Phases and several models: arithmetic, who moves and who stands still, the guard, averages, randomness, resuming."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypersd_jax import training
from hypersd_jax.config.fields import static
from hypersd_jax.training import Phase
from tests.helpers import toy_training as toy

MESH = training.make_mesh(1, 1)
REPEATS = 3
RATES = {"student": 1e-2, "critic": 3e-3, "head": 2e-2}


@training.step_argument
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(toy.Settings):
    """Clipping bites at every update of every model: clipped as one tree they would move otherwise.

    The student's loss is infinite where ``sound`` is 0 and not a number below; that of the others is infinite while the
    critic's age is out of ``ages``. Their gradients are finite all the same.
    """

    clip_norm: float = static(0.05)
    weight_decay: float = static(0.1)
    rates: tuple[float, float, float] = (RATES["student"], RATES["critic"], RATES["head"])
    ages: tuple[float, float] = (-math.inf, math.inf)
    sound: float = 1.0
    taken: tuple[int, ...] = static((0, 1))


SETTINGS = Settings()


def models():
    """``age`` falls with every update of the critic, so that a loss can tell the repetitions apart."""
    draw = np.random.default_rng(5)
    return {
        **toy.trainable(),
        "critic": {"kernel": draw.standard_normal((toy.FEATURES, 1), np.float32), "age": np.zeros(1, "f")},
        "head": {"gain": np.ones((1, 1), "f"), "bias": np.full((1, 1), 0.2, "f")},
    }


def make_beside(settings):
    def discriminator_loss(models, ema, frozen, rows, key):
        """Critic and head follow the student."""
        x, critic, head = toy.noisy(rows, key, settings.jitter), models["critic"], models["head"]
        error = x @ critic["kernel"] - jax.lax.stop_gradient(toy.predict(models["student"], frozen, x))
        logits = head["gain"] * error + head["bias"] - rows["y"]
        age = jax.lax.stop_gradient(critic["age"][0])
        low, high = settings.ages
        value = jnp.mean(jnp.square(error)) + jnp.mean(jnp.square(logits)) + critic["age"][0]
        return jnp.where((low <= age) & (age <= high), value, value + jnp.inf), {"gap": jnp.mean(jnp.abs(error))}

    return discriminator_loss


def make_student(settings):
    def student(models, ema, frozen, rows, key):
        """The toy's own loss, and a pull to the critic."""
        value, metrics = toy.make_loss(settings)(models, ema, frozen, rows, key)
        pull = toy.predict(models["student"], frozen, rows["x"]) - rows["x"] @ models["critic"]["kernel"]
        return value + 0.3 * jnp.mean(jnp.square(pull)) + jnp.log(settings.sound), metrics

    return student


def phases(settings):
    """Of both phases, those that are taken."""
    student, critic, head = settings.rates
    both = (
        Phase(models={"critic": critic, "head": head}, loss=make_beside(settings), repeats=REPEATS),
        Phase(models={"student": student}, loss=make_student(settings)),
    )
    return [both[index] for index in settings.taken]


STEP = training.make_step(phases, mesh=MESH)


def fresh(averaged=("student",)):
    return training.init_state(models(), SETTINGS, averaged=averaged, mesh=MESH)


def go(state, steps, **settings):
    """The state after some steps, and their metrics."""
    here, history = dataclasses.replace(SETTINGS, **settings), []
    for _ in range(steps):
        data = toy.batch(int(state.step), accumulate=here.accumulate)
        state, metrics = STEP(state, toy.frozen(), data, jax.random.key(7), here)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def each_leaf(first, second):
    return zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)


def test_two_steps_equal_the_same_written_by_hand():
    state, history = go(fresh(), 2)
    weights, ema = models(), {"student": models()["student"]}
    reference = optax.chain(optax.clip_by_global_norm(0.05), optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    moments, update = {name: reference.init(tree) for name, tree in weights.items()}, jax.jit(reference.update)
    order = [(("critic", "head"), make_beside(SETTINGS), REPEATS), (("student",), make_student(SETTINGS), 1)]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def differentiate(loss, names, weights, ema, rows, key):
        def of(moving):
            return loss({**weights, **moving}, ema, toy.frozen(), rows, key)

        return jax.value_and_grad(of, has_aux=True)({name: weights[name] for name in names})

    norms = []
    for step in range(2):
        rows = jax.tree.map(lambda leaf: leaf[0], toy.batch(step))
        key = jax.random.fold_in(jax.random.key(7), step)
        logged = {}
        for phase, (names, loss, repeats) in enumerate(order):
            for time in range(repeats):
                here = jax.random.fold_in(jax.random.fold_in(key, phase), time)
                (value, metrics), grads = differentiate(loss, names, weights, ema, rows, here)
                logged |= metrics | {"loss": value}
                for name in names:
                    rate = training.learning_rate_at(SETTINGS, RATES[name], step)
                    directions, moments[name] = update(grads[name], moments[name], weights[name])
                    updates = jax.tree.map(lambda leaf: -rate * leaf, directions)  # noqa: B023
                    weights = {**weights, name: optax.apply_updates(weights[name], updates)}
                    logged[f"{name}_grad_norm"] = optax.tree.norm(grads[name])
                    norms.append(float(logged[f"{name}_grad_norm"]))
        ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, ema, {"student": weights["student"]})
        logged |= {"grad_norm": logged.pop("student_grad_norm"), "update_norm": optax.tree.norm(updates), "lr": rate}
        logged |= {"param_norm": optax.tree.norm(weights["student"]), "skipped": 0}
        assert history[step] == pytest.approx({name: float(value) for name, value in logged.items()}, rel=2e-5)
    for ours, theirs in ((state.trainable, weights), (state.ema, ema), (state.opt_state, moments)):
        for a, b in each_leaf(ours, theirs):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)
    assert int(state.step) == 2
    assert min(norms) > 0.05  # all are clipped
    assert [int(state.opt_state[name][1].count) for name in RATES] == [2, 2 * REPEATS, 2 * REPEATS]


def test_a_model_that_has_no_phase_stands_still_to_the_bit():
    """Weight decay and moments too; in the whole step nobody does."""
    before = jax.device_get(fresh())
    alone, _ = go(fresh(), 2, taken=(1,))
    others, _ = go(fresh(), 2, taken=(0,))
    for state, still, moved in ((alone, ("critic", "head"), ("student",)), (others, ("student",), ("critic", "head"))):
        for part in ("trainable", "opt_state"):
            old, new = getattr(before, part), getattr(state, part)
            toy.assert_same({name: old[name] for name in still}, {name: new[name] for name in still})
            assert all(np.any(a != b) for name in moved for a, b in each_leaf(old[name], new[name]))


def test_accumulated_gradients_equal_the_big_batch():
    """In every phase, noise included."""
    (whole, big), (pieces, small) = (go(fresh(), 2, accumulate=n) for n in (1, 4))
    for one, four in zip(big, small, strict=True):
        assert one == pytest.approx(four, rel=1e-4, abs=1e-6)
    for a, b in each_leaf(whole.trainable, pieces.trainable):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(
    ("low", "high", "sound"),
    [
        (-np.inf, -1e-4, 1.0),  # the first repetition of the first phase alone
        (-1.5 * RATES["critic"], np.inf, 1.0),  # its last one alone
        (-np.inf, np.inf, 0.0),  # the last phase, after the others' good updates
        (-np.inf, np.inf, -1.0),
    ],
    ids=["first", "last", "student-infinite", "student-nan"],
)
def test_a_step_that_is_not_finite_anywhere_is_skipped_as_a_whole(low, high, sound):
    state, _ = go(fresh(), 2)
    before = jax.device_get(state)
    age = float(before.trainable["critic"]["age"][0])
    state, (metrics,) = go(state, 1, ages=(age + low, age + high), sound=sound)
    for part in ("trainable", "opt_state", "ema"):
        toy.assert_same(getattr(before, part), getattr(state, part))
    assert (int(state.step), int(state.skipped)) == (3, 1)
    assert (metrics["skipped"], metrics["update_norm"]) == (1, 0)
    state, (metrics,) = go(state, 1)
    assert np.isfinite(metrics["loss"])
    assert (int(state.step), int(state.skipped)) == (4, 1)


def one_step(phases, weights, seed=0, averaged=(), **moments):
    """One step; without moments each update is the learning rate against the gradient's sign."""
    moments = {"beta1": 0.0, "beta2": 0.0, **moments}
    settings = toy.Settings(warmup=0, schedule="constant", weight_decay=0.0, **moments)
    state = training.init_state(weights, settings, averaged=averaged)
    step = training.make_step(lambda _: phases, mesh=MESH)
    return step(state, {}, {"x": np.zeros((1, 2), np.float32)}, jax.random.key(seed), settings)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_skips_the_step_too():
    def steep(models, ema, frozen, rows, key):
        return jnp.sum(jnp.sqrt(models["a"])) + jnp.sum(models["b"]), {}  # a: value 0, slope infinite

    def gentle(models, ema, frozen, rows, key):
        return jnp.sum(jnp.square(models["b"])), {}

    phases = [Phase(models={"b": 1.0, "a": 1.0}, loss=steep), Phase(models={"b": 1.0}, loss=gentle)]
    state, metrics = one_step(phases, {"a": jnp.zeros(3), "b": jnp.full(3, 2.0)})
    assert int(state.skipped) == 1
    assert float(metrics["loss"]) == 12  # of b = 2: no model of the first phase was updated
    np.testing.assert_array_equal(state.trainable["a"], np.zeros(3))
    np.testing.assert_array_equal(state.trainable["b"], np.full(3, 2))


def drawn_in(name, *, models=None, repeats=1):
    """A phase whose metrics are what it draws."""

    def loss(models, ema, frozen, rows, key):
        drawn = jax.random.uniform(key, (2,))
        return sum(jnp.sum(each) for each in models.values()), {name: drawn[0], f"{name}_too": drawn[1]}

    return Phase(models=models or {name: 1.0}, loss=loss, repeats=repeats)


def test_repetitions_and_phases_draw_different_randomness():
    """Each from a key that is folded twice; of a repeated phase what is logged is the last."""
    weights = {name: jnp.zeros(1) for name in "abc"}
    first = jax.random.fold_in(jax.random.key(3), 0)  # state.step is 0

    def of(phase, time):
        drawn = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(first, phase), time), (2,))
        return [float(each) for each in drawn]

    def seen(metrics, name):
        return [float(metrics[name]), float(metrics[f"{name}_too"])]

    _, metrics = one_step([drawn_in("a", repeats=3), drawn_in("b"), drawn_in("c")], weights, seed=3)
    assert [seen(metrics, name) for name in "abc"] == [of(0, 2), of(1, 0), of(2, 0)]
    _, metrics = one_step([drawn_in("a", repeats=2), drawn_in("b")], weights, seed=3)
    assert seen(metrics, "a") == of(0, 1)
    _, metrics = one_step([drawn_in("a", models={"a": 1.0, "b": 1.0})], weights, seed=3)
    assert seen(metrics, "a") == of(0, 0)  # the only phase, but of two models
    streams = [of(phase, time) for phase in range(3) for time in range(3)]
    assert len(np.unique(streams)) == 18


def test_a_repeated_phase_is_given_the_same_rows_and_other_noise_each_time():
    """A gradient that is the noise itself: Adam's first moment adds up what was drawn."""
    repeats = 3

    def loss(models, ema, frozen, rows, key):
        return jnp.sum(1e-3 * jax.random.normal(key, (4,)) * models["a"]), {"first": rows["x"][0]}

    phases = [Phase(models={"a": 1.0}, loss=loss, repeats=repeats)]
    state, metrics = one_step(phases, {"a": jnp.zeros(4)}, seed=3, beta1=0.9, beta2=0.999)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 0)
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, time), (4,)) for time in range(repeats)])
    moment = 1e-3 * sum(0.1 * 0.9 ** (repeats - 1 - time) * noise[time] for time in range(repeats))
    np.testing.assert_allclose(state.opt_state["a"][1].mu, moment, rtol=1e-4, atol=1e-9)
    assert float(metrics["first"]) == 0
    assert int(state.opt_state["a"][1].count) == repeats


def test_a_phase_sees_what_the_phases_before_it_did():
    def follow(leader, follower):
        def loss(models, ema, frozen, rows, key):
            return -jnp.sum(models[leader] * models[follower]), {f"{follower}_saw": models[leader][0]}

        return Phase(models={follower: 1.0}, loss=loss)

    weights = {name: jnp.ones(1) for name in "abc"}
    state, metrics = one_step([follow("a", "b"), follow("b", "c"), follow("c", "a")], weights)
    assert [float(metrics[f"{name}_saw"]) for name in "bca"] == [1, 2, 2]
    assert [float(state.trainable[name][0]) for name in "abc"] == [2, 2, 2]


def test_all_phases_see_the_averages_of_the_step_before():
    def loss(models, ema, frozen, rows, key):
        return jnp.sum(models["a"]), {}

    def watch(models, ema, frozen, rows, key):
        return jnp.sum(models["b"]), {"weights": models["a"][0], "average": ema["a"][0]}

    phases = [Phase(models={"a": 1.0}, loss=loss), Phase(models={"b": 1.0}, loss=watch)]
    state, metrics = one_step(phases, {"a": jnp.ones(1), "b": jnp.ones(1)}, averaged=("a",))
    assert (float(metrics["weights"]), float(metrics["average"])) == (0, 1)
    np.testing.assert_allclose(state.ema["a"], [0.9], rtol=1e-6)


def test_only_the_averaged_models_have_an_average():
    state, _ = go(fresh(), 2, ema=0.0)
    assert set(state.ema) == {"student"}
    toy.assert_same(state.ema["student"], state.trainable["student"])
    both = fresh(averaged=("student", "head"))
    toy.assert_same(both.ema, {name: models()[name] for name in ("student", "head")})


def test_resuming_is_bit_identical(tmp_path):
    state, _ = go(fresh(), 2)
    like = training.abstract(MESH, state)
    with training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, {"stage": "dmd"})
        uninterrupted, _ = go(state, 2)
    with training.Checkpointer(tmp_path) as checkpointer:
        restored, metadata = checkpointer.restore(None, like)
    assert metadata == {"stage": "dmd"}
    assert set(restored.ema) == {"student"}
    assert int(restored.step) == 2
    again, _ = go(restored, 2)
    toy.assert_same(again, uninterrupted)


def test_the_metrics_names():
    _, (metrics,) = go(fresh(), 1)
    ours = {"loss", "grad_norm", "update_norm", "param_norm", "lr", "skipped", "critic_grad_norm", "head_grad_norm"}
    assert set(metrics) == ours | {"gap", "error", "drift"}
    assert metrics["lr"] == pytest.approx(0.5 * RATES["student"])  # the student's, in the first of two warm-ups


def test_the_first_model_of_the_last_phase_is_the_one_that_is_logged():
    """And of a model in two phases, the gradient of the later one."""

    def slope(**slopes):
        def loss(models, ema, frozen, rows, key):
            return sum(jnp.sum(each * models[name]) for name, each in slopes.items()), {}

        return loss

    phases = [
        Phase(models={"a": 1e-3, "b": 2e-3}, loss=slope(a=0.1, b=0.2)),
        Phase(models={"c": 3e-3, "b": 4e-3}, loss=slope(c=0.3, b=0.4)),
    ]
    _, metrics = one_step(phases, {"a": jnp.zeros(1), "b": jnp.zeros(1), "c": jnp.full(1, 5.0)})
    expected = {"loss": 1.5, "grad_norm": 0.3, "update_norm": 3e-3, "param_norm": 4.997, "lr": 3e-3, "skipped": 0}
    expected |= {"a_grad_norm": 0.1, "b_grad_norm": 0.4}
    # The loss of c = 5 and of b, which the first phase has moved by -2e-3.
    expected["loss"] -= 0.4 * 2e-3
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["lr", "param_norm", "b_grad_norm", "mine"])
def test_metrics_cannot_overwrite_each_other(name):
    def loss(models, ema, frozen, rows, key):
        return jnp.sum(models["a"]) + jnp.sum(models["b"]), {name: jnp.float32(0)}

    def other(models, ema, frozen, rows, key):
        return jnp.sum(models["b"]), {"mine": jnp.float32(0)}

    phases = [Phase(models={"b": 1.0}, loss=other), Phase(models={"a": 1.0}, loss=loss)]
    with pytest.raises(ValueError, match=name):
        one_step(phases, {"a": jnp.zeros(3), "b": jnp.zeros(3)})


def test_the_callers_arrays_outlive_the_donation_of_the_state():
    mine = jax.tree.map(jnp.asarray, models())
    state = training.init_state(mine, SETTINGS, averaged=("student",), mesh=MESH)
    go(state, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    toy.assert_same(mine, models())


def test_master_weights_of_every_model_must_be_float32():
    with pytest.raises(ValueError, match=r"\['b'\].*bfloat16"):
        training.init_state({"a": jnp.zeros(3), "b": jnp.zeros(3, jnp.bfloat16)}, SETTINGS, averaged=())
