"""The comparison after training, on a tiny model: every number again by hand, and the files that it writes."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hypersd_jax import adapters, compilation
from hypersd_jax.cli import main
from hypersd_jax.config import Config, ConsistencyStage, ScoreStage, load_config
from hypersd_jax.data import evaluation_list
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import (
    diversity,
    features,
    frechet_distance,
    generator,
    grid,
    kernel_distance,
    load_scorer,
    seen_by,
    text_match,
)
from hypersd_jax.evaluation import reference as references
from hypersd_jax.evaluation import samples as samples_module
from hypersd_jax.evaluation.comparison import Outcome, embedded_evaluator
from hypersd_jax.evaluation.evaluator import Evaluator
from hypersd_jax.evaluation.files import write_results
from hypersd_jax.evaluation.reference import (
    Reference,
    Teacher,
    compute_reference,
    get_reference,
    load_reference,
    reference_identity,
)
from hypersd_jax.evaluation.run_comparison import compare_run, run_report
from hypersd_jax.evaluation.sources import training_images
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.export import export_student
from hypersd_jax.training.output import Output, create_output
from tests.helpers.grids import cells, shown
from tests.helpers.lora_files import random_adapter
from tests.helpers.small_features import small_features
from tests.helpers.tiny_model import tiny_model

SAMPLES, BATCH, GUIDANCE, MANY, DIVERSE = 6, 4, 4.0, 12, 4
OWN = ("clip", "clip_shuffled", "clip_gain", "fid_train", "kid_train", "diversity")
BASE = "a fingerprint"
RECIPE = f"""
output_dir: {{output}}
model: {{model}}
data: {{{{source: emoji, resolution: 16}}}}
log: {{{{tensorboard: false, compilation_cache: false}}}}
evaluation: {{{{samples: {SAMPLES}, guidance: {GUIDANCE}, batch_size: {BATCH}}}}}
stages:
  - {{{{name: other, k: 2, solver_steps: 8, updates: 1, batch_size: 4}}}}
  - {{{{name: same, k: 1, solver_steps: 8, updates: 1, batch_size: 4}}}}
  - {{{{name: noisy, k: 2, solver_steps: 8, updates: 1, batch_size: 4, sampler: lcm}}}}
"""
STUDENTS = ("other", "same", "noisy")


class Compared(NamedTuple):
    """What one call of `compare` was given and returned."""

    config: Config
    output: Output
    pipe: Pipeline
    computed: Reference
    asked: tuple[Teacher, Evaluator]
    rows: list[dict[str, Any]]

    def row(self, model: str, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        (found,) = (
            row
            for row in self.rows
            if row["model"] == model and steps in (None, row["steps"]) and guidance in (None, row["guidance"])
        )
        return found

    def images(
        self, steps: int, guidance: float, lora: str | None = None, *, moved: int = 0, count: int = SAMPLES
    ) -> np.ndarray:
        """The list's beginning, uint8, all in one batch, from latents made here, with their seeds moved."""
        items = evaluation_list(SAMPLES)[:count]
        keys = [jax.random.key(item.seed + moved) for item in items]
        latents = np.stack([jax.random.normal(key, (8, 8, 4), jnp.float32) for key in keys])
        if lora is not None:
            self.pipe.load_lora(self.output.loras / f"{lora}.safetensors")
        call = {"steps": steps, "guidance": guidance, "sampler": "ddim", "eta": 0.0, "output": "np", "stepwise": True}
        images = self.pipe([item.prompt for item in items], latents=latents, **call)
        self.pipe.unload_lora()
        return np.round(images * 255).astype(np.uint8)

    def diversity(self, steps: int, guidance: float, lora: str | None = None) -> np.ndarray:
        """Of each of the first prompts, from four seeds."""
        sets = [
            looked(self.images(steps, guidance, lora, moved=moved, count=DIVERSE))
            for moved in (0, 1_000_000, 2_000_000, 3_000_000)
        ]
        return diversity(np.stack(sets, axis=1))


def looked(images: np.ndarray) -> np.ndarray:
    return features(images, batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with small_features() as patch:
        patch.setattr(generator, "MANY_STEPS", MANY)
        patch.setattr(generator, "DIVERSE_PROMPTS", DIVERSE)
        patch.setattr(samples_module, "SEEN_AT_A_TIME", 8)  # few images need no batches of 32
        patch.setattr(compilation, "use_compilation_cache", lambda: None)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, small: None) -> Compared:
    """Students: one that changes the base much, one whose LoRA is zero, one of a stochastic sampler."""
    folder = tmp_path_factory.mktemp("compared")
    model = tiny_model(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE.format(output=folder / "out", model=model))
    config = load_config(folder / "recipe.yaml")
    output = Output(Path(config.output_dir))
    create_output(output, config)
    logged = [{"stage": "other", "step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    (output.root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    pipe = Pipeline.from_pretrained(model)
    shapes = pipe.base.components.unet.shapes
    students = {
        "other": random_adapter(shapes, 1, scale=0.5),
        "same": adapters.init(jax.random.key(0), shapes, rank=4, alpha=None),
        "noisy": random_adapter(shapes, 2, scale=0.5),
    }
    for stage in config.stages:
        path = output.loras / f"{stage.name}.safetensors"
        export_student(path, students[stage.name], stage, pipe.base, base_fingerprint=BASE)
    computed: list[Reference] = []
    asked: list[tuple[Teacher, Evaluator]] = []

    def recording(teacher: Teacher, measuring: Evaluator) -> Reference:
        asked.append((teacher, measuring))
        computed.append(compute_reference(teacher, measuring))
        return computed[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "compute_reference", recording)
        rows = compare_run(config, output, pipe, BASE)
    return Compared(config, output, pipe, computed[0], asked[0], rows)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    difference = (a.astype(np.float64) - b.astype(np.float64)) / 255
    return np.asarray([np.sqrt(np.mean(one**2)) for one in difference])


def standard_error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def test_the_rows(compared: Compared) -> None:
    assert json.loads((compared.output.root / "results.json").read_text()) == compared.rows
    found = [(row["model"], row["steps"], row["guidance"], row["calls"]) for row in compared.rows]
    assert found == [
        ("teacher", MANY, GUIDANCE, 2 * MANY),
        ("teacher, other latents", MANY, GUIDANCE, 2 * MANY),
        *[("teacher", steps, GUIDANCE, 2 * steps) for steps in (8, 4, 2, 1)],
        *[("teacher", steps, 0.0, steps) for steps in (8, 4, 2, 1)],
        ("other", 2, 0.0, 2),
        ("same", 1, 0.0, 1),
        ("noisy", 2, 0.0, 2),
    ]
    for row in compared.rows:
        assert row["n"] == SAMPLES
        assert row["sampler"] == ("lcm" if row["model"] == "noisy" else "ddim")
        assert row["seconds_per_image"] > 0
        assert all(np.isfinite(row[key]) for key in OWN)
    assert len({row["protocol"] for row in compared.rows}) == 1
    assert all(("margin" in row) == (row["model"] in STUDENTS) for row in compared.rows)


def test_a_students_row_by_hand(compared: Compared) -> None:
    """The tolerance in distance is one grey level of one value in an image, for roundings that fall elsewhere."""
    row = compared.row("other")
    reference, student = compared.images(MANY, GUIDANCE), compared.images(2, 0.0, "other")
    baselines = {
        "1 step, guidance 4": distances(compared.images(1, GUIDANCE), reference),
        "2 steps, guidance 0": distances(compared.images(2, 0.0), reference),
    }
    name = min(baselines, key=lambda baseline: float(baselines[baseline].mean()))
    assert row["baseline"] == name
    own = distances(student, reference)
    gains = baselines[name] - own
    close = {"rel": 1e-4, "abs": 1e-5}
    assert row["distance"] == pytest.approx(own.mean(), **close)
    assert row["distance_se"] == pytest.approx(standard_error(own), **close)
    assert row["margin"] == pytest.approx(gains.mean(), **close)
    assert row["margin_se"] == pytest.approx(standard_error(gains), **close)
    assert abs(row["margin"]) > 1e-3, "too small for its sign to mean anything"
    assert (row["margin"] > 0) == (own.mean() < baselines[name].mean())

    mine, theirs = looked(reference), looked(student)
    kid = kernel_distance(theirs, mine)
    assert row["kid"] == pytest.approx(kid.mean, rel=1e-3, abs=1e-4)
    assert row["fid_teacher"] == pytest.approx(frechet_distance(theirs, mine), rel=1e-3)
    same_calls = [compared.row("teacher", 1, GUIDANCE), compared.row("teacher", 2, 0.0)]
    assert row["kid_margin"] == pytest.approx(min(baseline["kid"] for baseline in same_calls) - row["kid"], abs=1e-9)


@pytest.mark.parametrize(
    ("model", "steps", "guidance", "lora"),
    [("teacher", MANY, GUIDANCE, None), ("teacher", 2, 0.0, None), ("other", 2, 0.0, "other")],
)
def test_what_needs_no_teacher_by_hand(
    compared: Compared, model: str, steps: int, guidance: float, lora: str | None
) -> None:
    """Text match, distances to training images, and diversity; a row of the reference as a student's."""
    row, images = compared.row(model, steps, guidance), compared.images(steps, guidance, lora)
    real, mine = looked(training_images(SAMPLES, None, 16).first), looked(images)
    assert row["fid_train"] == pytest.approx(frechet_distance(mine, real), rel=1e-3)
    kid = kernel_distance(mine, real)
    assert (row["kid_train"], row["kid_train_se"]) == pytest.approx(kid, rel=1e-3)
    scorer = load_scorer("report")
    match = text_match(scorer, seen_by(scorer.spec, images, batch_size=8), [i.prompt for i in evaluation_list(SAMPLES)])
    assert match is not None
    assert row["clip"] == pytest.approx(match.own.mean(), rel=1e-3, abs=1e-2)
    assert row["clip_gain"] == pytest.approx((match.own - match.shuffled).mean(), rel=1e-3, abs=1e-2)
    assert row["clip_gain"] == pytest.approx(row["clip"] - row["clip_shuffled"], abs=1e-9)
    found = compared.diversity(steps, guidance, lora)
    assert row["diversity"] == pytest.approx(found.mean(), rel=1e-3)
    assert row["diversity_se"] == pytest.approx(standard_error(found), rel=1e-2)
    assert row["diversity"] > 0.1, "images of different seeds differ"


def test_the_teachers_two_rows_share_four_seeds(compared: Compared) -> None:
    first, other = compared.row("teacher", MANY), compared.row("teacher, other latents")
    assert other["diversity"] == pytest.approx(first["diversity"], rel=1e-9)
    assert other["fid_train"] != first["fid_train"]


def test_a_student_samples_as_its_stage_says() -> None:
    call: dict[str, Any] = {"name": "x", "updates": 1, "batch_size": 1, "eta": 0.5}
    common: dict[str, Any] = {"eta": 0.5, "sampler": "ddim"}
    stage = ConsistencyStage(k=2, solver_steps=8, sampler="ddim", sample_guidance=2.5, **call)
    assert stage.samplings == ({**common, "steps": 2, "guidance": 2.5, "timesteps": None},)
    score = ScoreStage(kind="dmd", times=(800,), steps=(1, 4), sampler="ddim", guidance=7.0, **call)
    one = {**common, "steps": 1, "guidance": 0.0, "timesteps": (800,)}
    assert score.samplings == (one, {**one, "steps": 4, "timesteps": None})


def test_a_student_like_the_base_gains_nothing(compared: Compared) -> None:
    row, teacher = compared.row("same"), compared.row("teacher", 1, 0.0)
    assert row["baseline"] == "1 step, guidance 0"
    for key in ("margin", "margin_se", "kid_margin"):
        assert row[key] == pytest.approx(0.0, abs=1e-7), key
    for key in ("distance", "distance_se", "kid", "fid_teacher", *OWN):
        assert row[key] == pytest.approx(teacher[key], abs=1e-7), key


def ranked(compared: Compared) -> list[int]:
    """The list's indices, from the best text match of the teacher's image to the least; worked out here."""
    scorer, images = load_scorer("report"), compared.images(MANY, GUIDANCE)
    match = text_match(scorer, seen_by(scorer.spec, images, batch_size=8), [i.prompt for i in evaluation_list(SAMPLES)])
    assert match is not None
    return [int(index) for index in np.argsort(-match.own, kind="stable")]


def test_eight_seeds_of_a_prompt(compared: Compared, tmp_path: Path) -> None:
    """The rows' middle prompt, from the seeds 0 to 7, in a grid of its own."""
    middle = evaluation_list(SAMPLES)[ranked(compared)[SAMPLES // 2]].prompt
    page = (compared.output.root / "report.html").read_text(encoding="utf-8")
    (image,) = re.findall(rf"{re.escape(middle)}: eight seeds.*?base64,([^\"]+)", page, flags=re.DOTALL)
    (tmp_path / "seeds.png").write_bytes(base64.b64decode(image))
    latents = np.stack([jax.random.normal(jax.random.key(seed), (8, 8, 4), jnp.float32) for seed in range(8)])
    call: dict[str, Any] = {"steps": MANY, "guidance": GUIDANCE, "sampler": "ddim", "eta": 0.0, "stepwise": True}
    images = np.round(compared.pipe([middle] * 8, latents=latents, output="np", **call) * 255).astype(np.uint8)
    for cell, given in zip(cells(tmp_path / "seeds.png", 0, 8).astype(int), images, strict=True):
        assert np.abs(cell - shown(given)).max() <= 2


def test_the_grid_holds_the_images(compared: Compared) -> None:
    """Its rows go from the prompt that the teacher's image fits best to the one that it fits least."""
    path, side = compared.output.root / "grid.png", grid.LEAST_CELL
    order = ranked(compared)
    assert order != sorted(order)
    columns = [
        compared.images(MANY, GUIDANCE),
        compared.images(2, GUIDANCE),
        compared.images(2, 0.0, "other"),
        compared.images(1, GUIDANCE),
        compared.images(1, 0.0, "same"),
    ]
    width = grid.TEXT_WIDTH + (len(columns) + 1) * (side + grid.GAP) + 2 * grid.GAP
    assert Image.open(path).size[0] == width, "and the third student"
    for column, images in enumerate(columns):
        for cell, image in zip(cells(path, column, SAMPLES).astype(int), images[order], strict=True):
            assert np.abs(cell - shown(image)).max() <= 2, column


def test_evaluate_generates_the_same_images(compared: Compared, tmp_path: Path) -> None:
    """One prompt, seed and stochastic sampler give one image, whichever command it is of, and the same figures."""
    root, student = compared.output.root, "noisy"
    call = ["--model", compared.config.model.source, "--lora", root / "loras" / f"{student}.safetensors"]
    call += ["--n", SAMPLES, "--batch-size", BATCH, "--reference-guidance", GUIDANCE]
    main(["evaluate", *map(str, call), "--output", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    theirs, mine = rows[-1], compared.row(student)
    assert (mine["sampler"], mine["steps"]) == (theirs["sampler"], theirs["steps"]) == ("lcm", 2)
    theirs_in_order = cells(tmp_path / "out" / "grid.png", -1, SAMPLES)[ranked(compared)]
    np.testing.assert_array_equal(cells(root / "grid.png", -1, SAMPLES), theirs_in_order)
    assert theirs["protocol"] == mine["protocol"]
    for key in ("n", "calls", "distance", "diversity", "kid", "fid_train", "clip_gain"):
        assert theirs[key] == pytest.approx(mine[key], rel=1e-5, abs=1e-6), key


def test_the_report_says_the_margin(compared: Compared) -> None:
    page = (compared.output.root / "report.html").read_text(encoding="utf-8")
    row = compared.row("other")
    side = "nearer to" if row["margin"] > 0 else "farther from"
    assert f"other: 2 steps, {abs(row['margin']):.4f} ± {row['margin_se']:.4f} {side}" in page
    assert f"{MANY}-step images" in page
    assert page.count("data:image/png;base64,") == 2  # the list, and eight seeds of a prompt
    assert page.count(" (hard)") >= 1
    assert page.count("<svg") == 4 + 1  # two metrics against steps and calls, and the loss of a stage
    assert "hypersd_jax.train(" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert not list(compared.output.root.glob("*.tmp*"))
    assert not list(compared.output.root.glob(".*"))


def test_the_report_of_a_run_that_has_trained_nothing_itself(compared: Compared, tmp_path: Path) -> None:
    """All its stages are reused from another run: there are no curves, and all the rest."""
    output = Output(tmp_path / "out")
    create_output(output, dataclasses.replace(compared.config, output_dir=str(output.root)))
    columns = {"one": np.zeros((1, 8, 8, 3), np.uint8)}
    outcome = Outcome(
        rows=compared.rows, columns=columns, prompts=["apple"], ranked=False, seeds=[0], seeds_columns={}, seconds=1.0
    )
    write_results(output.root, run_report(compared.config, output, outcome, None))
    page = (output.root / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "Loss" not in page
    assert page.count("data:image/png;base64,") == 1
    assert "other: 2 steps" in page
    assert json.loads((output.root / "results.json").read_text()) == compared.rows


def test_the_reference_is_kept_and_read_back(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    (teacher, measuring), fresh = compared.asked, compared.computed
    path = compared.output.root / "reference.npz"
    loaded, _ = get_reference(teacher, measuring, path.parent)
    np.testing.assert_array_equal(loaded.samples.images, fresh.samples.images)
    np.testing.assert_array_equal(loaded.samples.features, fresh.samples.features)
    for a, b in zip(loaded.rows, fresh.rows, strict=True):
        assert {**a.row, "protocol": ""} == {**b.row, "protocol": ""}
        assert a.row["protocol"] == compared.rows[0]["protocol"]
        np.testing.assert_array_equal(a.distances, b.distances)

    def found(teacher: Teacher = teacher, measuring: Evaluator = measuring, device: str = "") -> Reference | None:
        return load_reference(path, reference_identity(teacher, measuring), measuring, device)

    # Seconds of another device are not read.
    elsewhere = found(device="another")
    assert elsewhere is not None
    assert [set(a.row) - set(b.row) for a, b in zip(loaded.rows, elsewhere.rows, strict=True)] == [
        {"seconds_per_image"} for _ in loaded.rows
    ]
    # It belongs to this base, list, real images, guidance, choice of seeds and scorer alone.
    items = measuring.items
    for change in ({"base": "another"}, {"guidance": 5.0}, {"few": teacher.few[1:]}):
        assert found(dataclasses.replace(teacher, **change)) is None
    scorer = load_scorer("report")
    other = dataclasses.replace(scorer, params={**scorer.params, "eye.mean": scorer.params["eye.mean"] + 1.0})
    for change in (
        {"items": items[:-1]},
        {"items": (items[0]._replace(seed=77), *items[1:])},
        {"further": measuring.further[:2]},
        {"real_name": "others"},
        {"scorer": other},
    ):
        assert found(measuring=dataclasses.replace(measuring, **change)) is None, change


def test_a_protocol_is_that_of_what_decides_the_figures(compared: Compared) -> None:
    """Not of the model, nor of how it samples; but of prompts, seeds, real images, reference, size and scorer."""
    _, measuring = compared.asked
    again = embedded_evaluator(compared.pipe, SAMPLES, None)
    assert again.protocol == measuring.protocol
    assert re.fullmatch("[0-9a-f]{12}", again.protocol)
    items = measuring.items
    changed = [
        {"items": items[:-1]},
        {"items": (items[0]._replace(seed=77), *items[1:])},
        {"further": ()},
        {"real_name": None},
        {"size": (32, 16)},
        {"scorer": None},
        {"reference_metadata": {"steps": 3}},
    ]
    found = {dataclasses.replace(measuring, **change).protocol for change in changed}
    assert len(found | {measuring.protocol}) == len(changed) + 1


def without(path: Path, key: str) -> bytes:
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files if name != key}
    np.savez(path, **kept)
    return path.read_bytes()


DAMAGES = {
    "empty": lambda path: b"",
    "text": lambda path: b"not a reference",
    "cut": lambda path: path.read_bytes()[: path.stat().st_size // 2],
    "bytes": lambda path: path.read_bytes()[:2000] + b"\x55" * 500 + path.read_bytes()[2500:],
    "no distances": lambda path: without(path, "distances"),
    "no rows": lambda path: without(path, "rows"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_reference(compared: Compared, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "reference.npz"
    path.write_bytes((compared.output.root / "reference.npz").read_bytes())
    path.write_bytes(DAMAGES[damage](path))
    with pytest.raises(UserError, match=r"reference\.npz: the reference is damaged .*delete the file"):
        get_reference(*compared.asked, tmp_path)
