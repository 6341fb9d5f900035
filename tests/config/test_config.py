"""Typed configuration: what is read, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hypersd_jax import recipes
from hypersd_jax.config import (
    Config,
    ConsistencyStage,
    GeneratorStage,
    build,
    first_difference,
    load_config,
    save_config,
    to_dict,
)
from hypersd_jax.errors import UserError
from hypersd_jax.training import make_mesh
from hypersd_jax.training.loop import require_even
from hypersd_jax.weights.hub import parse_id

RECIPES = recipes.recipe_files()
BASE = """
output_dir: out
stages:
  - {name: a, k: 4, updates: 5, batch_size: 2}
  - {name: b, k: 1, updates: 5, batch_size: 2}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_shipped_recipe_is_instantiated_and_written_back(name: str, tmp_path: Path) -> None:
    config = load_config(RECIPES[name])
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    consistency = [stage for stage in config.adapter_stages if isinstance(stage, ConsistencyStage)]
    shapes: dict[bool, set[Any]] = {}
    for stage in consistency:
        leaves, structure = jax.tree.flatten(stage)
        found = (structure, *(np.shape(leaf) for leaf in leaves))
        shapes.setdefault(stage.adversarial is not None, set()).add(found)
    assert all(len(found) == 1 for found in shapes.values())  # those of one kind share one compiled step
    if config.adapter_stages:
        segments = {"emoji/cfg-preserving": [8], "emoji/style": [], "sdxl/lora-4step": [8, 4]}
        assert [stage.k for stage in consistency] == segments.get(name, [8, 4, 2, 1])
    assert all(isinstance(stage, GeneratorStage) for stage in config.adapter_stages[4:])


def test_the_three_recipes_are_there() -> None:
    assert {f"{name}{part}" for name in ("emoji", "sd15", "sdxl") for part in ("", "/hyper")} <= set(RECIPES)


@pytest.mark.parametrize(
    ("later", "earlier"),
    [("emoji/unified", "emoji/hyper"), ("emoji/one-step-unet", "emoji"), ("emoji/feedback", "emoji/hyper")],
)
def test_a_recipe_that_reuses_another_run_has_its_stages(later: str, earlier: str) -> None:
    assert load_config(RECIPES[later]).stages[:4] == load_config(RECIPES[earlier]).stages[:4]


def test_every_recipe_states_its_command_its_hardware_and_its_result() -> None:
    for name, path in RECIPES.items():
        header = path.read_text(encoding="utf-8").partition("\noutput_dir")[0]
        assert "python train.py" in header, name
        assert "Hardware:" in header, name
        assert "esult" in header, name


@pytest.mark.parametrize("name", ["emoji/hyper", "configs/emoji/hyper", "configs/emoji/hyper.yaml"])
def test_a_recipe_in_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # as where the package is installed, and no folder of recipes is at hand
    assert recipes.find_recipe(name) == RECIPES["emoji/hyper"]


def test_overrides(base: Path) -> None:
    config = load_config(
        base,
        [
            "seed=3",
            "stages.0.updates=7",
            "stages.b.learning_rate=1e-4",
            "stages.*.batch_size=16",
            "model=somewhere",
            "model.dtype=bfloat16",
            "stages.b.guidance=[2, 3.5]",
            "data.groups=[food & drink]",
        ],
    )
    assert config.seed == 3
    assert [stage.updates for stage in config.stages] == [7, 5]
    assert config.stages[1].learning_rate == 1e-4
    assert [stage.batch_size for stage in config.stages] == [16, 16]
    assert (config.model.source, config.model.dtype) == ("somewhere", "bfloat16")
    assert config.stages[1].guidance == (2.0, 3.5)
    assert config.data.groups == ("food & drink",)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sed=1", "unknown key sed; did you mean seed?"),
        ("stages.0.learning_rat=1", "unknown key stages.0.learning_rat; did you mean learning_rate?"),
        ("stages.0.updates=many", "stages.0.updates must be a whole number, not 'many'"),
        ("stages.0.updates=1.5", "stages.0.updates must be a whole number"),
        ("stages.0.updates=true", "stages.0.updates must be a whole number"),
        ("stages.0.updates=0", "stages.0.updates must be at least 1"),
        ("stages.0.k=3", "solver_steps .40. must be a multiple of k .3."),
        ("stages.0.learning_rate=nan", "stages.0.learning_rate must be a finite number"),
        ("stages.0.learning_rate=-1", "stages.0.learning_rate must be above 0"),
        ("stages.0.guidance=[5, 4]", "guidance must be a range"),
        ("stages.0.guidance=4", "stages.0.guidance must be a list"),
        ("stages.0.guidance=[1, 2, 3]", "stages.0.guidance must have 2 values, not 3"),
        ("stages.0.kind=tscdd", "stages.0.kind='tscdd' is not valid; did you mean tscd?"),
        ("stages.0.ema=1.0", "ema, beta1 and beta2 must lie in"),
        ("stages.0.name=a/b", "name 'a/b' must be a plain file name"),
        ("stages.0.name=b", "the name 'b' is used twice"),
        ("stages.c.updates=1", "no entry 'c'"),
        ("stages=[]", "stages must name at least one stage"),
        ("model.dtype=float16", "model.dtype='float16' is not valid"),
        ("lora.rank=0", "lora.rank must be at least 1"),
        ("log.every=0", "every and checkpoint_every"),
        ("evaluation=no", "evaluation must be a mapping"),
        ("nonsense", "must look like key.path=value"),
        ("seed.x=1", "x cannot be set inside|seed"),
        ("output_dir=", "output_dir must be text"),
    ],
)
def test_bad_values_are_named(base: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_config(base, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: [", "line"),
        ("- 1", "must hold a mapping"),
        ("output_dir: x", "stages is missing"),
        ("stages: [{name: a, k: 1, updates: 1, batch_size: 1}]", "output_dir is missing"),
        ("output_dir: x\nstages: [{name: a, updates: 1, batch_size: 1}]", "stages.0.k is missing"),
        ("", "must hold a mapping"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: no such file"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="did you mean sdxl"):
        recipes.find_recipe("configs/sdxll.yaml")


def test_first_difference(base: Path) -> None:
    a = to_dict(load_config(base))
    b = to_dict(load_config(base, ["stages.1.updates=6"]))
    assert first_difference(a, a) is None
    assert first_difference(a, b) == "stages.1.updates (5 against 6)"
    shorter = {**a, "stages": a["stages"][:1]}
    assert str(first_difference(a, shorter)).startswith("stages")
    assert build(Config, a) == load_config(base)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("evaluation: {samples: 2}", "evaluation.samples must be 0, or at least 3, which KID needs, not 2"),
        ("model: {fresh: [unet]}", "model.fresh: stages that train an adapter need a complete model"),
    ],
)
def test_what_would_fail_after_training_is_refused_before(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE + text + "\n")
    with pytest.raises(UserError, match=reason):
        load_config(path)


def test_a_kind_that_is_no_name(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: out\nstages:\n- {name: a, kind: [tscd], updates: 1, batch_size: 1}\n")
    with pytest.raises(UserError, match=r"stages.0.kind=\['tscd'\] is not valid"):
        load_config(path)


def test_a_first_stage_that_is_there_already_is_refused(base: Path) -> None:
    """A later stage has another student to teach, and a solver finer than k or guidance something to be learnt."""
    bare = ["stages.a.solver_steps=4", "stages.a.guidance=[1, 1]"]
    with pytest.raises(UserError, match=r"stages.a: with guidance \[1, 1\] and solver_steps = k .* must be above 4"):
        load_config(base, bare)
    for overrides in (["stages.a.solver_steps=8"], ["stages.a.guidance=[1, 2]"], ["stages.a.skip=true"]):
        load_config(base, [*bare, *overrides])
    load_config(base, ["stages.b.solver_steps=1", "stages.b.guidance=[1, 1]"])


HUB = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}


@pytest.mark.parametrize("name", ["sd15", "sd15/hyper", "sdxl", "sdxl/hyper"])
def test_stock_recipes_run_on_one_device_and_name_the_models_of_the_hub(name: str) -> None:
    path = RECIPES[name]
    config, family = load_config(path), name.partition("/")[0]
    assert config.model.source == HUB[family]
    assert parse_id(config.model.source) is not None
    assert load_config(path, ["model=/models/mine"]).model.source == "/models/mine"
    assert load_config(path, ["model=/models/mine"]).model.dtype == "bfloat16"
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices=jax.devices()[:1])
    for stage in config.active_stages:
        require_even(stage, mesh)
        assert stage.batch_size // stage.accumulate <= (8 if family == "sdxl" else 32)


def test_fsdp_is_a_number_or_auto(base: Path) -> None:
    assert load_config(base, ["mesh.fsdp=auto"]).mesh.fsdp == "auto"
    assert load_config(base, ["mesh.fsdp=4"]).mesh.fsdp == 4
    for text in ("all", "1.5", "true", "[1]"):
        with pytest.raises(UserError, match=r"^mesh.fsdp must be a whole number, not .*, nor auto$"):
            load_config(base, [f"mesh.fsdp={text}"])


@pytest.mark.parametrize("override", ["log.checkpoint_minutes=-1", "log.stop_after_skipped=0"])
def test_settings_of_the_log(base: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"^log.checkpoint_minutes must be at least 0, stop_after_skipped at least 1"):
        load_config(base, [override])
