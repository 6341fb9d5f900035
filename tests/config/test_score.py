"""Settings of score distillation, adversarial terms and skipped stages: what is read, what is refused and how."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hypersd_jax.config import (
    AdversarialConfig,
    ConsistencyStage,
    RegressionConfig,
    RegulariserConfig,
    ScoreStage,
    load_config,
    save_config,
)
from hypersd_jax.errors import UserError

BASE = """
output_dir: out
stages:
  - {name: a, k: 4, updates: 5, batch_size: 2}
  - {name: b, kind: dmd, updates: 5, batch_size: 2}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.b.kind=dmdd"], "stages.1.kind='dmdd' is not valid; did you mean dmd?"),
        (["stages.b.student=vae"], "stages.1.student='vae' is not valid"),
        (["stages.b.sampler=euler"], "stages.1.sampler='euler' is not valid"),
        (["stages.b.k=1"], "unknown key stages.1.k"),
        (["stages.b.time_range=[0.5, 0.5]"], "stages.1.time_range must be [low, high]"),
        (["stages.b.time_range=[-0.1, 0.5]"], "stages.1.time_range must be [low, high]"),
        (["stages.b.time_range=[0.5, 1.1]"], "stages.1.time_range must be [low, high]"),
        (["stages.b.time_range=[0.5]"], "stages.1.time_range must have 2 values, not 1"),
        (["stages.b.times=[]"], "stages.1.times must fall, not []"),
        (["stages.b.times=[499, 999]"], "stages.1.times must fall, not [499, 999]"),
        (["stages.b.times=[499, 499]"], "stages.1.times must fall, not [499, 499]"),
        (["stages.b.times=[999, 0]"], "stages.1.times must be at least 1, not 0"),
        (["stages.b.times=[99.5]"], "stages.1.times.0 must be a whole number, not 99.5"),
        (["stages.b.steps=[4, 0]"], "stages.1.steps must be counts of at least 1, not [4, 0]"),
        (["stages.b.weight=-1"], "stages.1.weight must not be negative, not -1.0"),
        (["stages.b.guidance=0.5"], "stages.1.guidance must be at least 1, which is off, not 0.5"),
        (["stages.a.guidance=[0, 3]"], "stages.0.guidance must be a range [low, high] with 1 <= low <= high"),
        (["stages.a.adversarial.r1_sigma=0.1"], "stages.0.adversarial.r1_sigma is read only with"),
        (["stages.b.guidance=[3, 8]"], "stages.1.guidance must be a number, not [3, 8]"),
        (["stages.b.fake_updates=0"], "stages.1.fake_updates must be at least 1 and fake_learning_rate above 0"),
        (["stages.b.fake_learning_rate=0"], "stages.1.fake_updates must be at least 1 and fake_learning_rate above 0"),
        (["stages.b.eta=1.5"], "stages.1.eta must lie in 0..1, not 1.5"),
        (["stages.b.updates=0"], "stages.1.updates must be at least 1, not 0"),
        (["stages.b.times=[999, 499]", "stages.b.regression={}"], "stages.1.regression is of a one-step student"),
        (["stages.b.adversarial.features=pair"], "stages.1.adversarial.features=pair is of consistency stages"),
        (["stages.b.adversarial.updates=2"], "stages.1.adversarial.updates: here the heads are trained with the fake"),
        (["stages.b.data_free=true", "stages.b.adversarial={}"], "stages.1.data_free: an adversarial term needs imag"),
        (["stages.b.student=unet", "stages.b.sampler=tcd"], "stages.1.student=unet is sampled with lcm at its own t"),
        (["stages.b.student=unet", "stages.b.steps=[1, 2]"], "stages.1.student=unet is sampled with lcm at its own t"),
        (["stages.b.student=unet", "stages.b.kind=tdm"], "stages.1.kind=tdm: its steps are deterministic"),
        (["stages.b.kind=tdm", "stages.b.times=[999, 990]"], "stages.1.times: only the first may lie above time_range"),
        (["stages.b.weight=0"], "stages.1.weight=0 leaves nothing to match; without the"),
        (["stages.a.name=previous"], "stages: the name 'previous' is a teacher's already"),
        # the nested mappings
        (["stages.b.regression.weight=0"], "stages.1.regression.weight must be above 0, not 0.0"),
        (["stages.b.regression.path_weight=-1"], "stages.1.regression.path_weight must not be negative, not -1.0"),
        (["stages.b.regression.pairs=-2"], "stages.1.regression.pairs must not be negative, not -2"),
        (["stages.b.regression.pairs=3"], "stages.1.regression.pairs must be a multiple of batch_size=2"),
        (["stages.b.regression.pairs=12"], "stages.1.regression.pairs: more than the stage's updates come to"),
        (["stages.b.regression.path_range=[0.5, 0.1]"], "stages.1.regression.path_range must be [low, high] with"),
        (["stages.b.regression.path_range=[0.1, 0.5]"], "stages.1.regression.path_range is read only with a path"),
        (["stages.b.regression.steps=0"], "stages.1.regression.steps must be at least 1, not 0"),
        (["stages.b.regression.teacher="], "stages.1.regression.teacher must be text, not nothing"),
        (["stages.b.regression=0.25"], "stages.1.regression must be a mapping of keys, not 0.25"),
        (["stages.b.anchor.weight=0"], "stages.1.anchor.weight must be above 0, not 0.0"),
        (["stages.b.anchor.solver_steps=0"], "stages.1.anchor.solver_steps must be at least 1, not 0"),
        (["stages.b.anchor.teacher="], "stages.1.anchor.teacher must be text, not nothing"),
        (["stages.b.anchor.solver_step=40"], "unknown key stages.1.anchor.solver_step; did you mean solver_steps?"),
        (["stages.a.adversarial.wieght=1"], "unknown key stages.0.adversarial.wieght; did you mean weight?"),
        (["stages.a.adversarial.weight=-1"], "stages.0.adversarial.weight and r1_weight must not be negative"),
        (["stages.a.adversarial.r1_weight=-1"], "stages.0.adversarial.weight and r1_weight must not be negative"),
        (["stages.a.adversarial.learning_rate=0"], "stages.0.adversarial.learning_rate and r1_sigma must be above 0"),
        (["stages.a.adversarial.r1_sigma=0"], "stages.0.adversarial.learning_rate and r1_sigma must be above 0"),
        (["stages.a.adversarial.updates=0"], "stages.0.adversarial.updates must be at least 1, not 0"),
        (["stages.a.adversarial.loss=wgan"], "stages.0.adversarial.loss='wgan' is not valid"),
        (["stages.a.adversarial.features=down"], "stages.0.adversarial.features='down' is not valid"),
        (["stages.a.adversarial.weight=nan"], "stages.0.adversarial.weight must be a finite number"),
        # the consistency stages' new fields
        (["stages.a.distance_weight=0"], "stages.0.distance_weight"),
        (["stages.a.distance_weight=-1", "stages.a.adversarial={}"], "stages.0.distance_weight"),
        (["stages.a.kind=lcm", "stages.a.k=1", "stages.a.adversarial={}"], "stages.0.adversarial: kind=lcm compares"),
        (["stages.a.prompt_dropout=1"], "stages.0.prompt_dropout must lie in [0, 1), not 1.0"),
        (["stages.a.prompt_dropout=-0.1"], "stages.0.prompt_dropout must lie in [0, 1), not -0.1"),
        (["stages.a.sample_guidance=-1"], "stages.0.sample_guidance must not be negative, not -1.0"),
        # the run
        (["stages.*.skip=true"], "stages: all of them are skipped"),
        (["stages.a.skip=1"], "stages.0.skip must be true or false, not 1"),
        (["stages.b.name=a"], "stages: the name 'a' is used twice"),
    ],
)
def test_what_is_refused(base: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(message)) as error:
        load_config(base, overrides)
    assert "\n" not in str(error.value)


def test_what_is_not_given(base: Path, tmp_path: Path) -> None:
    first, second = load_config(base).stages
    assert isinstance(first, ConsistencyStage)
    assert (first.adversarial, first.distance_weight, first.prompt_dropout, first.skip) == (None, 1.0, 0.0, False)
    assert isinstance(second, ScoreStage)
    assert (second.regression, second.anchor, second.adversarial) == (None, None, None)
    assert (second.student, second.times, second.steps, second.sampler) == ("lora", (999,), (1,), "tcd")


def test_overrides_reach_into_mappings_that_the_file_leaves_out(base: Path) -> None:
    overrides = [
        "stages.0.adversarial.weight=0.2",
        "stages.0.adversarial.features=pair",
        "stages.b.regression.steps=4",
        "stages.b.anchor.weight=5e-1",
        "stages.b.adversarial.learning_rate=1e-4",
    ]
    first, second = load_config(base, overrides).stages
    assert first.adversarial == AdversarialConfig(weight=0.2, features="pair")
    assert second.regression == RegressionConfig(steps=4)
    assert second.anchor == RegulariserConfig(weight=0.5)
    assert second.adversarial == AdversarialConfig(learning_rate=1e-4)
    assert load_config(base, [*overrides, "stages.0.adversarial=null"]).stages[0].adversarial is None


def test_written_back_and_read_again(base: Path, tmp_path: Path) -> None:
    overrides = ["stages.b.adversarial.r1_weight=0.5", "stages.b.regression={}", "stages.b.anchor.solver_steps=20"]
    config = load_config(base, [*overrides, "stages.a.skip=true", "stages.a.adversarial={}"])
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "sampler"),
    [
        ([], "tcd"),
        (["stages.b.sampler=ddim"], "ddim"),
        (["stages.b.student=unet"], "lcm"),
        (["stages.b.student=unet", "stages.b.times=[999, 499]", "stages.b.steps=[2]"], "lcm"),
    ],
)
def test_auto_sampler_of_a_score_stage(base: Path, overrides: list[str], sampler: str) -> None:
    assert load_config(base, overrides).stages[1].sampler == sampler


@pytest.mark.parametrize(("kind", "sampler"), [("tscd", "ddim"), ("pcm", "ddim"), ("tcd", "tcd"), ("lcm", "lcm")])
def test_auto_sampler_of_a_consistency_stage(base: Path, kind: str, sampler: str) -> None:
    overrides = [f"stages.a.kind={kind}", "stages.a.k=1"]
    assert load_config(base, overrides).stages[0].sampler == sampler
    assert load_config(base, [*overrides, "stages.a.sampler=tcd"]).stages[0].sampler == "tcd"


def test_the_distance_may_be_left_out_beside_an_adversarial_term(base: Path) -> None:
    (first, _) = load_config(base, ["stages.a.distance_weight=0", "stages.a.adversarial={}"]).stages
    assert first.distance_weight == 0


def test_skipped_stages_are_left_out_of_the_run(base: Path) -> None:
    config = load_config(base, ["stages.a.skip=true", "stages.a.batch_size=7"])
    assert [stage.name for stage in config.stages] == ["a", "b"]
    assert [stage.name for stage in config.active_stages] == ["b"]
    assert config.adapter_stages == config.active_stages
    assert config.batch_size == 2
    assert load_config(base, ["stages.a.batch_size=7"]).batch_size is None


def test_a_whole_unet_must_be_the_last_of_the_stages_that_are_run(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    last = "  - {name: c, k: 1, updates: 5, batch_size: 2}\n"
    path.write_text(BASE.replace("kind: dmd", "kind: dmd, student: unet") + last)
    message = "stages.b: a stage with student=unet must be the last"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_config(path)
    assert [stage.name for stage in load_config(path, ["stages.c.skip=true"]).active_stages] == ["a", "b"]
    assert [stage.name for stage in load_config(path, ["stages.b.skip=true"]).active_stages] == ["a", "c"]


def test_score_stages_and_whole_models_cannot_share_a_run(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE + "  - {name: c, kind: teacher, updates: 5, batch_size: 2}\n")
    with pytest.raises(UserError, match=r"^stages: those that train an adapter and those that train a model"):
        load_config(path)
