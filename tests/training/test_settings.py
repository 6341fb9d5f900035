"""A stage's settings as the step's argument: what is a number there, what a choice, and what compiles anew."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax import training
from hypersd_jax.config.fields import derived, outside, static
from hypersd_jax.training import Phase
from tests.helpers import toy_training as toy
from tests.helpers.compilations import Compilations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Not registered by itself."""

    weight: float = 0.5
    updates: int = static(1)
    word: Literal["one", "two"] = "one"
    teacher: str = outside("base")

    @derived
    def there(self) -> bool:
        return self.weight > 0

    @derived
    def from_base(self) -> bool:
        return self.teacher == "base"


@training.step_argument
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(toy.Settings):
    """One field of every sort, and more."""

    schedule: Literal["constant", "cosine", "linear"] = "linear"
    name: str = outside()
    file: str = outside("student.safetensors")
    rows: int = outside(4)
    whole: int = 3
    share: float = 0.25
    guidance: tuple[float, float] = (3.0, 8.0)
    times: tuple[int, ...] = (999, 500)
    gamma: float | None = None
    flag: bool = False
    length: int = static(2)
    part: Part | None = None

    @derived
    def guided(self) -> bool:
        return self.guidance != (1.0, 1.0)


SETTINGS = Settings(name="a")
MESH = training.make_mesh(1, 1)
COMPILATIONS = Compilations.counting()


def values(settings) -> dict[str, Any]:
    """What a loss may read, by name; the same outside the step and inside."""
    found = {
        "whole": settings.whole,
        "share": settings.share,
        "low": settings.guidance[0],
        "high": settings.guidance[1],
        "times": sum(settings.times),
        "flag": settings.flag,
        "length": settings.length,
        "guided": settings.guided,
    }
    if settings.gamma is not None:
        found["gamma"] = settings.gamma
    if settings.part is not None:
        found["weight"] = settings.part.weight
        found |= {"part_updates": settings.part.updates, "two": settings.part.word == "two"}
        found |= {"there": settings.part.there, "from_base": settings.part.from_base}
    return found


def phases(settings):
    def loss(models, ema, frozen, rows, key):
        return jnp.sum(models["a"]), {name: jnp.float32(value) for name, value in values(settings).items()}

    return [Phase(models={"a": settings.learning_rate}, loss=loss)]


@pytest.fixture
def step() -> training.Step:
    """Nothing of it is compiled yet."""
    return training.make_step(phases, mesh=MESH)


def compiled(step: training.Step, settings: Settings) -> int:
    """How many programs a step compiles, after a look at whether it has received all values."""
    state = training.init_state({"a": jnp.ones(2)}, settings, averaged=("a",), mesh=MESH)
    state = jax.block_until_ready(dataclasses.replace(state, step=jnp.int32(4)))
    key, rows = jax.random.key(0), {"x": np.zeros((settings.accumulate, 1), np.float32)}
    before = COMPILATIONS.count
    state, metrics = step(state, {}, rows, key, settings)
    found = COMPILATIONS.count - before
    for name, value in values(settings).items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6), name
    rate = float(training.learning_rate_at(settings, settings.learning_rate, 4))
    assert float(metrics["lr"]) == pytest.approx(rate, rel=1e-6)
    new = np.asarray(state.trainable["a"])
    np.testing.assert_allclose(state.ema["a"], settings.ema + (1 - settings.ema) * new, rtol=1e-6)
    return found


def changed(**changes) -> Settings:
    return dataclasses.replace(SETTINGS, **changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 1.0),
        ("learning_rate", 1),  # a whole number where a real one is meant
        ("warmup", 8),
        ("updates", 99),
        ("ema", 0.0),
        ("whole", -7),
        ("share", 0.75),
        ("guidance", (1.5, 4.0)),
        ("guidance", (2, 3)),
        ("times", (800, 1)),
    ],
)
def test_another_number_compiles_nothing(step, key, value):
    assert compiled(step, SETTINGS) == 1
    assert compiled(step, changed(**{key: value})) == 0


def test_other_numbers_of_a_part_compile_nothing(step):
    assert compiled(step, changed(part=Part())) == 1
    assert compiled(step, changed(part=Part(weight=0.125))) == 0
    assert compiled(step, changed(part=Part(weight=3.0), gamma=None, learning_rate=0.5)) == 0


def test_what_is_outside_compiles_nothing(step):
    assert compiled(step, changed(part=Part())) == 1
    assert compiled(step, changed(part=Part(), name="b", file="c", rows=8)) == 0
    assert compiled(step, changed(part=Part(teacher="previous"))) == 1  # but for the choice that follows from it
    assert compiled(step, changed(part=Part(teacher="another"))) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "constant"},
        {"flag": True},
        {"length": 3},
        {"accumulate": 2},
        {"weight_decay": 0.0},
        {"clip_norm": 0.5},
        {"beta2": 0.99},
        {"part": Part()},
        {"gamma": 5.0},
        {"gamma": 0.0},  # which is there
        {"guidance": (1.0, 1.0)},  # `guided` flips
        {"times": (999, 500, 1)},  # another shape
    ],
    ids=str,
)
def test_another_choice_compiles_a_program_of_its_own(step, changes):
    assert compiled(step, SETTINGS) == 1
    other = changed(**changes)
    assert compiled(step, other) == 1
    assert [compiled(step, each) for each in (SETTINGS, other)] == [0, 0]  # both stay


@pytest.mark.parametrize("changes", [{"weight": 0.0}, {"updates": 2}, {"word": "two"}], ids=str)
def test_another_choice_of_a_part_compiles_a_program_of_its_own(step, changes):
    assert compiled(step, changed(part=Part())) == 1
    assert compiled(step, changed(part=Part(**changes))) == 1


def inside(settings: Settings) -> Any:
    """The settings as they are in the step, whose numbers have a type and a shape alone."""
    seen = []
    jax.eval_shape(seen.append, settings)
    return seen[0]


def test_numbers_are_arrays_of_their_kind():
    settings = inside(changed(part=Part(), gamma=5.0, learning_rate=1, guidance=(3, 8)))
    assert (type(settings), type(settings.part)) == (Settings, Part)
    arrays = {name: each for name, each in vars(settings).items() if isinstance(each, jax.Array)}
    assert {name: (each.dtype.name, each.shape) for name, each in arrays.items()} == {
        **dict.fromkeys(("updates", "warmup", "whole"), ("int32", ())),
        **dict.fromkeys(("learning_rate", "ema", "jitter", "share", "gamma"), ("float32", ())),
        "guidance": ("float32", (2,)),
        "times": ("int32", (2,)),
    }
    assert settings.part.weight.dtype == np.float32


def test_choices_are_pythons_own():
    settings = inside(changed(part=Part(weight=0.0)))
    choices = {"schedule": "linear", "flag": False, "length": 2, "guided": True, "beta1": 0.9, "accumulate": 1}
    assert {name: vars(settings)[name] for name in choices} == choices
    assert (settings.flag, settings.guided) == (False, True)
    assert (settings.part.there, settings.part.updates, settings.part.word) == (False, 1, "one")
    assert inside(changed(guidance=(1.0, 1.0))).guided is False  # of the numbers outside; here they are not known


def test_none_stays_none():
    settings = inside(SETTINGS)
    assert settings.gamma is None
    assert settings.part is None


@pytest.mark.parametrize("name", ["name", "file", "rows"])
def test_what_is_outside_is_not_there(name):
    """Nor is its default, which would pass for it."""
    settings = inside(changed(file="other", rows=9))
    with pytest.raises(AttributeError, match=name):
        getattr(settings, name)


def test_what_is_outside_in_a_part_is_not_there():
    settings = inside(changed(part=Part(teacher="previous")))
    with pytest.raises(AttributeError, match="teacher"):
        _ = settings.part.teacher


def test_registering_again_changes_nothing(step):
    assert compiled(step, SETTINGS) == 1
    assert training.step_argument(Settings) is Settings
    assert compiled(step, SETTINGS) == 0


def test_the_stage_outside_stays_as_it_was(step):
    """Python's own numbers, as the run's record says them."""
    settings = changed(part=Part())
    before = dataclasses.asdict(settings)
    compiled(step, settings)
    assert dataclasses.asdict(settings) == before
    assert (type(settings.learning_rate), type(settings.guidance)) == (float, tuple)
