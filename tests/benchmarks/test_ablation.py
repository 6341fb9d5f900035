"""The ablation command: what a matrix may say, which stages are shared, and which margins count."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml

from benchmarks.matrix import training
from benchmarks.matrix.output import plot, write_results
from benchmarks.matrix.recipes import planned, read_matrix, recipe_config, sampled_of
from benchmarks.matrix.tables import margins, summarise, verdict
from benchmarks.matrix.training import missing_updates, run_folder, train_recipe
from hypersd_jax.errors import UserError
from hypersd_jax.training.reuse import history
from hypersd_jax.weights.tensors import save_tensors

ROOT = Path(__file__).parents[2]
RECIPE = """
output_dir: nowhere
data: {source: emoji}
stages:
  - {name: two, k: 2, solver_steps: 8, updates: 6, batch_size: 4}
  - {name: one, k: 1, solver_steps: 4, updates: 4, batch_size: 4, sampler: tcd, eta: 0.5}
"""
TCD = {"name": "tcd", "kind": "tcd", "k": 1, "updates": 7, "batch_size": 4}
MATRIX: dict[str, Any] = {
    "against": "tscd",
    "seeds": [0, 1],
    "samples": 4,
    "recipes": [
        {"name": "tscd"},
        {"name": "longer", "overrides": ["stages.one.updates=9"]},
        {"name": "tcd-2", "label": "tcd", "stages": [TCD], "draw": [{"stage": "tcd", "steps": 2}]},
    ],
}


def matrix_file(folder: Path, **changes: Any) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE)
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({"base": str(folder / "recipe.yaml"), **MATRIX, **changes}))
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "ablation").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_matrix_is_sound(path: Path) -> None:
    matrix = read_matrix(path)
    for recipe in matrix.recipes:
        config = recipe_config(matrix, recipe, matrix.seeds[0], Path("out"))
        assert config.compared_samples == 0
        assert sampled_of(recipe, config)


def test_the_baselines_have_the_sum_of_the_updates() -> None:
    matrix = read_matrix(ROOT / "benchmarks" / "ablation" / "tscd_vs_baselines.yaml")
    budgets: dict[tuple[str, int], set[int]] = {}
    for recipe in matrix.recipes:
        config = recipe_config(matrix, recipe, 0, Path("out"))
        assert {stage.batch_size for stage in config.adapter_stages} == {16}
        for row in sampled_of(recipe, config):
            stages = config.adapter_stages[: [s.name for s in config.adapter_stages].index(row.stage) + 1]
            budgets.setdefault((recipe.method, row.steps), set()).add(sum(stage.updates for stage in stages))
    assert {method for method, _ in budgets} == {"tscd", "tcd", "lcm", "pcm"}
    for (method, steps), found in budgets.items():
        assert found == budgets["tscd", steps], (method, steps)
        assert len(found) == 1
    assert len(matrix.seeds) == 3


def test_a_recipe_may_have_some_of_the_seeds(tmp_path: Path) -> None:
    recipes = [{"name": "tscd"}, {"name": "longer", "seeds": [1], "overrides": ["stages.one.updates=9"]}]
    matrix = read_matrix(matrix_file(tmp_path, recipes=recipes))
    found = [(seed, recipe.name) for seed, recipe in planned(matrix.recipes, matrix.seeds)]
    assert found == [(0, "tscd"), (1, "tscd"), (1, "longer")]


def test_what_is_sampled(tmp_path: Path) -> None:
    matrix = read_matrix(matrix_file(tmp_path))
    settled = [sampled_of(recipe, recipe_config(matrix, recipe, 0, tmp_path)) for recipe in matrix.recipes]
    found = [[(row.stage, row.steps, row.sampler, row.eta) for row in rows] for rows in settled]
    assert found[0] == found[1] == [("two", 2, "ddim", 0.0), ("one", 1, "tcd", 0.5)]
    assert found[2] == [("tcd", 2, "tcd", 0.0)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"agains": "x"}, "unknown key agains"),
        ({"against": "other"}, "against='other' is no recipe's label"),
        ({"seeds": []}, "recipes and seeds must be there"),
        ({"samples": 2}, "samples must be at least 3"),
        ({"recipes": [{"name": "tscd", "seeds": [2]}]}, "recipes.tscd: seeds must be among the matrix's, not [2]"),
        ({"recipes": [{"name": "tscd", "overrides": ["sed=1"]}]}, "recipes.tscd: unknown key sed"),
        ({"recipes": [{"name": "tscd", "draw": [{"stage": "x", "steps": 1}]}]}, "recipes.tscd.draw: no stage 'x'"),
        (
            {"recipes": [{"name": "tscd", "draw": [{"stage": "one", "steps": 2, "timesteps": [800]}]}]},
            "recipes.tscd.draw: 1 timesteps for 2 steps",
        ),
        ({"panels": [{"title": "a", "points": [{"recipe": "x", "at": "1"}]}]}, "panels: no recipe 'x'"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = matrix_file(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        read_matrix(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def test_a_history_is_all_that_made_a_student(tmp_path: Path) -> None:
    matrix = read_matrix(matrix_file(tmp_path))
    config = recipe_config(matrix, matrix.recipes[0], 0, tmp_path / "a")
    longer = recipe_config(matrix, matrix.recipes[1], 0, tmp_path / "b")
    key = history(config, 1, "base")
    assert key == history(longer, 1, "base")
    assert history(config, 2, "base") != history(longer, 2, "base")
    others = [
        history(config, 1, "another base"),
        history(recipe_config(matrix, matrix.recipes[0], 1, tmp_path), 1, "base"),
        history(dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=3)), 1, "base"),
        history(dataclasses.replace(config, data=dataclasses.replace(config.data, white_fraction=0.1)), 1, "base"),
        history(config, 2, "base"),
    ]
    assert len({key, *others}) == 6


class FakeTraining:
    """`train`, but for the training: what a run leaves, stage by stage, going on with what is there."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.killed_after: int | None = None

    def __call__(self, config: Any) -> Path:
        root = Path(config.output_dir)
        for number, stage in enumerate(config.adapter_stages):
            folder = root / "checkpoints" / stage.name / str(stage.updates)
            if not folder.exists():
                if number == self.killed_after:
                    raise KeyboardInterrupt
                self.trained.append(stage.name)
                (folder / "state").mkdir(parents=True)
                (folder / "state" / "data").write_text(stage.name)
            lora = root / "loras" / f"{stage.name}.safetensors"
            lora.parent.mkdir(exist_ok=True)
            if not lora.exists():
                save_tensors(lora, {"x": np.full(3, stage.updates, np.float32)})
        return root


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    found = FakeTraining()
    monkeypatch.setattr(training, "train", found)
    return found


def test_a_shared_stage_is_trained_once(tmp_path: Path, fake: FakeTraining) -> None:
    matrix, root = read_matrix(matrix_file(tmp_path)), tmp_path / "out"
    configs = []
    for recipe in matrix.recipes:
        folder = run_folder(recipe_config(matrix, recipe, 0, root), root, "base")
        configs.append(recipe_config(matrix, recipe, 0, folder))
        assert configs[-1].output_dir == str(folder)
    promised: set[str] = set()
    assert [missing_updates(config, root, "base", promised) for config in configs] == [10, 9, 7]
    fake.killed_after = 1
    with pytest.raises(KeyboardInterrupt):
        train_recipe(configs[0], root, "base")
    fake.killed_after = None
    loras = [train_recipe(config, root, "base") for config in configs]
    assert fake.trained == ["two", "one", "one", "tcd"]
    assert loras[0]["two"] == loras[1]["two"]
    assert loras[0]["one"] != loras[1]["one"]
    assert all(path.exists() for found in loras for path in found.values())
    assert missing_updates(configs[1], root, "base", set()) == 0
    # Nothing is trained again, and a run's own checkpoints are gone but for the shared ones.
    assert [train_recipe(config, root, "base") for config in configs] == loras
    assert fake.trained == ["two", "one", "one", "tcd"]
    assert not list((root / "runs").glob("*/checkpoints"))
    assert len(list((root / "stages").glob("*/checkpoints/*/state/data"))) == 4
    assert not list(root.rglob(".tmp-*"))


def results(method: str, distances: list[float], kids: list[float], steps: int = 4) -> list[dict[str, Any]]:
    common = {"method": method, "recipe": f"{method}-{steps}", "stage": "s", "steps": steps, "sampler": "ddim"}
    common |= {"eta": 0.0, "timesteps": None, "updates": 10, "fid_teacher": 1.0, "kid_train": 2.0, "clip_gain": 30.0}
    pairs = zip(distances, kids, strict=True)
    return [{**common, "seed": seed, "distance": d, "kid": k} for seed, (d, k) in enumerate(pairs)]


def test_means_spreads_and_margins() -> None:
    runs = [
        *results("tscd", [0.10, 0.11, 0.12], [0.1, 0.2, 0.3]),
        *results("tcd", [0.14, 0.14, 0.17], [0.2, 0.3, 0.4]),
        *results("pcm", [0.05, 0.06, 0.07], [9.0, 9.1, 9.2]),
    ]
    rows = summarise(runs)
    assert [(row["method"], row["seeds"]) for row in rows] == [("tscd", 3), ("tcd", 3), ("pcm", 3)]
    assert rows[0]["distance"] == pytest.approx(0.11)
    assert rows[0]["distance_sd"] == pytest.approx(0.01)
    found = {(row["other"], row["metric"]): row for row in margins(rows, "tscd")}
    distance, kid = found["tcd (ddim)", "distance"], found["tcd (ddim)", "kid"]
    assert distance["margin"] == pytest.approx(0.04)
    assert distance["pooled_sd"] == pytest.approx(math.sqrt((0.01**2 + 0.0003) / 2))
    assert distance["verdict"] == "better"
    assert kid["margin"] == pytest.approx(0.1)
    assert kid["verdict"] == "not shown"
    assert found["pcm (ddim)", "distance"]["verdict"] == "worse"


def test_of_the_text_match_more_is_better() -> None:
    more, less = results("tscd", [0.1] * 2, [0.1] * 2), results("tcd", [0.1] * 2, [0.1] * 2)
    gains = [{**run, "clip_gain": gain} for run, gain in zip([*more, *less], (50.0, 51.0, 40.0, 41.0), strict=True)]
    (found,) = (row for row in margins(summarise(gains), "tscd") if row["metric"] == "clip_gain")
    assert found["margin"] == pytest.approx(10.0)
    assert found["verdict"] == "better"


def test_a_margin_counts_over_two_pooled_deviations() -> None:
    assert verdict(0.2, 0.1) == "not shown"
    assert verdict(0.2001, 0.1) == "better"
    assert verdict(-0.2001, 0.1) == "worse"
    assert verdict(1.0, None) == "one seed"
    one = summarise([*results("tscd", [0.1], [0.1]), *results("tcd", [0.9], [0.9])])
    assert {row["verdict"] for row in margins(one, "tscd")} == {"one seed"}


class FakeScorer:
    prompts = ("red apple", "blue car")
    teacher_title = "teacher"
    teacher_images = np.zeros((2, 8, 8, 3), np.uint8)
    many_steps: ClassVar = {"steps": 25, "kid_train": 0.2, "clip_gain": 53.0}

    def teachers(self) -> list[dict[str, Any]]:
        own = {"method": "teacher", "steps": 4, "guidance": 4.0, "distance": 0.2, "kid": 0.1, "fid_teacher": 9.0}
        return [{**own, "kid_train": 0.3, "clip_gain": 20.0}]


def test_what_is_written(tmp_path: Path) -> None:
    panels = [{"title": "kind", "points": [{"recipe": "tscd", "at": "a"}, {"recipe": "longer", "at": "b"}]}]
    matrix = read_matrix(matrix_file(tmp_path, panels=panels))
    runs = [*results("tscd", [0.1, 0.2], [0.1, 0.2]), *results("tcd", [0.4, 0.5], [0.1, 0.2])]
    runs = [{**run, "images": np.full((2, 8, 8, 3), 99, np.uint8)} for run in runs]
    page = write_results(tmp_path / "results", "title", ["facts"], matrix, runs, FakeScorer())  # type: ignore[arg-type]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "README.md",
        "grid.png",
        "results.json",
    ]  # and no plot, for no axis of it has been measured
    assert (tmp_path / "results" / "README.md").read_text() == page
    assert (
        "| 4 | tscd | tscd-4 / s | ddim | 10 | 0.1500 ± 0.0707 | 0.150 ± 0.071 | 1 ± 0 | 2.000 ± 0.000 "
        "| 30.0 ± 0.0 | 2 |"
    ) in page
    assert "| 25 | teacher | | ddim | | 0 | | | 0.200 | 53.0 | |" in page
    assert "| 4 | teacher, guidance 4 | | ddim | | 0.2000 | 0.100 | 9 | 0.300 | 20.0 | |" in page
    assert "| 4 | tcd (ddim) | distance | +0.3000 | 0.0707 | better |" in page
    measured = [{**run, "recipe": name} for run in runs for name in ("tscd", "longer")]
    write_results(tmp_path / "results", "title", ["facts"], matrix, measured, FakeScorer())  # type: ignore[arg-type]
    assert (tmp_path / "results" / "plot.png").exists()


def test_the_plot_has_a_line_for_each_number_of_steps(tmp_path: Path) -> None:
    panels = [{"title": "kind", "points": [{"recipe": "tscd", "at": "a"}, {"recipe": "longer", "at": "b"}]}]
    matrix = read_matrix(matrix_file(tmp_path, panels=panels))
    runs = [*results("tscd", [0.1, 0.3], [0, 0], 4), *results("tscd", [0.5, 0.6], [0, 0], 1)]
    rows = summarise({**run, "recipe": name} for run in runs for name in ("tscd", "longer"))
    axes = plot(matrix.panels, rows).axes[0]
    lines = [container[0] for container in axes.containers]
    assert [list(line.get_ydata()) for line in lines] == [pytest.approx([0.2, 0.2]), pytest.approx([0.55, 0.55])]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


def test_the_plot_leaves_out_what_is_not_there_yet(tmp_path: Path) -> None:
    points = [{"recipe": "tscd", "at": "a"}, {"recipe": "longer", "at": "b"}]
    matrix = read_matrix(matrix_file(tmp_path, panels=[{"title": "kind", "points": points}]))
    rows = summarise({**run, "recipe": "tscd"} for run in results("tscd", [0.1, 0.3], [0, 0], 4))
    assert plot(matrix.panels, rows).axes == []
