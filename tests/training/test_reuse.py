"""Stages reused from another run: as far as their histories agree, and no further."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hypersd_jax import training
from hypersd_jax.config import Config, load_config
from hypersd_jax.errors import UserError
from hypersd_jax.training.output import create_output, open_output
from hypersd_jax.training.reuse import history, require_run, reuse_stages
from hypersd_jax.weights.tensors import save_tensors
from tests.helpers import toy_training as toy

RECIPE = """
output_dir: OUTPUT
stages:
  - {name: two, k: 2, solver_steps: 8, updates: 2, batch_size: 4}
  - {name: one, k: 1, solver_steps: 8, updates: 3, batch_size: 4}
  - {name: whole, kind: dmd, student: unet, updates: 4, batch_size: 4}
"""


def recipe(folder: Path, name: str, *overrides: str) -> Config:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return load_config(path, [f"output_dir={folder / name}", *overrides])


def pretend(config: Config, updates: dict[str, int] | None = None) -> None:
    """What a run leaves after so many updates of its stages, by name (None: all of them)."""
    output = open_output(config)
    create_output(output, config)
    state = toy.fresh()
    for number, stage in enumerate(config.adapter_stages):
        done = stage.updates if updates is None else updates.get(stage.name, 0)
        if not done:
            continue
        with training.Checkpointer(output.checkpoints(stage.name)) as checkpoints:
            checkpoints.save(done, state, {"history": history(config, number + 1, "base")})
        if done == stage.updates and stage.name == "whole":
            (output.models / "whole").mkdir(parents=True)
            (output.models / "whole" / "model_index.json").write_text("{}")
        elif done == stage.updates:
            save_tensors(output.loras / f"{stage.name}.safetensors", {"x": np.full(2, number, np.float32)})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    pretend(recipe(folder, "out"))
    return folder / "out"


def take(folder: Path, finished: Path, *overrides: str) -> tuple[list[str], Path]:
    config = recipe(folder, "new", f"reuse={finished}", *overrides)
    output = open_output(config)
    create_output(output, config)
    return reuse_stages(config, output, "base"), output.root


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), ["two", "one", "whole"]),
        (("stages.whole.updates=9",), ["two", "one"]),
        (("stages.one.learning_rate=1e-3",), ["two"]),
        (("stages.two.ema=0.5",), []),
        (("seed=1",), []),
        (("lora.rank=3",), []),
        (("data.white_fraction=0.1",), []),
        (("stages.one.skip=true",), ["two"]),
        (("mesh.fsdp=2", "log.every=3", "evaluation.batch_size=2"), ["two", "one", "whole"]),
    ],
    ids=lambda value: "-".join(value) or "same",
)
def test_stages_are_taken_as_far_as_their_histories_agree(
    tmp_path: Path, finished: Path, overrides: tuple[str, ...], expected: list[str]
) -> None:
    taken, root = take(tmp_path, finished, *overrides)
    assert taken == expected
    for stage in ("two", "one", "whole"):
        student = Path("models/whole/model_index.json") if stage == "whole" else Path(f"loras/{stage}.safetensors")
        assert (root / student).exists() == (stage in expected)
        assert (root / "checkpoints" / stage).exists() == (stage in expected)
        if stage in expected:
            assert (root / student).read_bytes() == (finished / student).read_bytes()
            with training.Checkpointer(root / "checkpoints" / stage) as checkpoints:
                assert checkpoints.metadata().keys() == {"history"}
    assert not list(root.rglob(".tmp-*"))


def test_an_unfinished_stage_is_not_taken(tmp_path: Path) -> None:
    pretend(recipe(tmp_path, "half"), {"two": 2, "one": 2})
    assert take(tmp_path, tmp_path / "half")[0] == ["two"]


def test_what_is_there_already_stays(tmp_path: Path, finished: Path) -> None:
    config = recipe(tmp_path, "new", f"reuse={finished}")
    pretend(config, {"two": 2})
    mine = config.output_dir + "/loras/two.safetensors"
    save_tensors(mine, {"x": np.full(2, 99, np.float32)})
    before = Path(mine).read_bytes()
    assert take(tmp_path, finished)[0] == ["two", "one", "whole"]
    assert Path(mine).read_bytes() == before


def test_what_the_other_run_is_saving_stays(tmp_path: Path) -> None:
    """It may be training its next stage, whose half-written checkpoint is no leftover."""
    pretend(recipe(tmp_path, "half"), {"two": 2, "one": 2})
    saving = [tmp_path / "half" / "checkpoints" / stage / "3.orbax-checkpoint-tmp" for stage in ("two", "one")]
    for folder in saving:
        folder.mkdir()
    taken, root = take(tmp_path, tmp_path / "half")
    assert taken == ["two"]
    assert all(folder.is_dir() for folder in saving)
    assert not list(root.rglob("*orbax-checkpoint-tmp*"))


def test_another_base_takes_nothing(tmp_path: Path, finished: Path) -> None:
    config = recipe(tmp_path, "new", f"reuse={finished}")
    create_output(open_output(config), config)
    assert reuse_stages(config, open_output(config), "another") == []


def test_an_own_unfinished_stage_goes_on(tmp_path: Path, finished: Path) -> None:
    pretend(recipe(tmp_path, "new", f"reuse={finished}"), {"two": 1})
    assert take(tmp_path, finished)[0] == []


def test_where_links_cannot_be_made_files_are_copied(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    taken, root = take(tmp_path, finished)
    assert taken == ["two", "one", "whole"]
    assert (root / "loras/two.safetensors").stat().st_nlink == 1


def test_the_base_is_part_of_the_history(tmp_path: Path) -> None:
    config = recipe(tmp_path, "out")
    assert history(config, 1, "base") != history(config, 1, "another")
    assert len({history(config, count, "base") for count in (1, 2, 3)}) == 3


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reuse: .*nowhere is not a run's folder \(config.yaml is missing\)"):
        require_run(recipe(tmp_path, "new", f"reuse={tmp_path / 'nowhere'}"))
    require_run(recipe(tmp_path, "new"))
