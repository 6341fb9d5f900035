"""The comparison after training, on a tiny model: every number again by hand, and the files that it writes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hypersd_jax import adapters
from hypersd_jax.config import Config, ConsistencyStage, ScoreStage, load_config
from hypersd_jax.data import evaluation_list
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import (
    diversity,
    features,
    frechet_distance,
    grid,
    kernel_distance,
    load_scorer,
    seen_by,
    text_match,
)
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import appraisal, comparison
from hypersd_jax.stages import reference as references
from hypersd_jax.stages.comparison import compare
from hypersd_jax.stages.comparison_report import Outcome, write_comparison
from hypersd_jax.stages.evaluate_sources import training_pictures
from hypersd_jax.stages.export import export_student
from hypersd_jax.stages.output import Output, create_output
from hypersd_jax.stages.reference import (
    Reference,
    compute_reference,
    draw,
    get_reference,
    load_reference,
    reference_identity,
)
from tests.helpers.lora_files import random_adapter
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
"""


class Compared(NamedTuple):
    """What one call of `compare` was given and returned."""

    config: Config
    output: Output
    pipe: Pipeline
    computed: Reference
    rows: list[dict[str, Any]]

    def row(self, model: str, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        (found,) = (
            row
            for row in self.rows
            if row["model"] == model and steps in (None, row["steps"]) and guidance in (None, row["guidance"])
        )
        return found

    def pictures(
        self, steps: int, guidance: float, lora: str | None = None, *, moved: int = 0, count: int = SAMPLES
    ) -> np.ndarray:
        """Pictures of the list's beginning, uint8, all in one batch, from latents made here, with their seeds moved."""
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
            looked(self.pictures(steps, guidance, lora, moved=moved, count=DIVERSE))
            for moved in (0, 1_000_000, 2_000_000, 3_000_000)
        ]
        return diversity(np.stack(sets, axis=1))


def looked(images: np.ndarray) -> np.ndarray:
    return features(images, batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "MANY_STEPS", MANY)
        patch.setattr(comparison, "MANY_STEPS", MANY)
        patch.setattr(references, "DIVERSE_PROMPTS", DIVERSE)
        for module in (appraisal, references):  # few pictures need no batches of 32
            patch.setattr(module, "features", looked)
        patch.setattr(appraisal, "seen_by", functools.partial(seen_by, batch_size=8))
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, small: None) -> Compared:
    """Two students: one that changes the base much, one whose LoRA is zero."""
    folder = tmp_path_factory.mktemp("compared")
    model = tiny_model(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE.format(output=folder / "out", model=model))
    config = load_config(folder / "recipe.yaml")
    output = Output(Path(config.output_dir))
    create_output(output, config)
    logged = [{"stage": "other", "step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    (output.root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    pipe = Pipeline.from_pretrained(model)
    shapes = pipe.components.unet.shapes
    students = {
        "other": random_adapter(shapes, 1, scale=0.5),
        "same": adapters.init(jax.random.key(0), shapes, rank=4, alpha=None),
    }
    for stage in config.stages:
        path = output.loras / f"{stage.name}.safetensors"
        export_student(path, students[stage.name], stage, pipe.components, base_fingerprint=BASE)
    computed: list[Reference] = []

    def recording(*args: Any, **kwargs: Any) -> Reference:
        computed.append(compute_reference(*args, **kwargs))
        return computed[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "compute_reference", recording)
        rows = compare(config, output, pipe, BASE)
    return Compared(config, output, pipe, computed[0], rows)


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
    ]
    for row in compared.rows:
        assert row["n"] == SAMPLES
        assert row["sampler"] == "ddim"
        assert row["seconds_per_image"] > 0
        assert all(np.isfinite(row[key]) for key in OWN)
    assert all(("margin" in row) == (row["model"] in ("other", "same")) for row in compared.rows)


def test_a_students_row_by_hand(compared: Compared) -> None:
    """The tolerance in distance is one grey level of one value in a picture, for roundings that fall elsewhere."""
    row = compared.row("other")
    reference, student = compared.pictures(MANY, GUIDANCE), compared.pictures(2, 0.0, "other")
    rivals = {
        "1 step, guidance 4": distances(compared.pictures(1, GUIDANCE), reference),
        "2 steps, guidance 0": distances(compared.pictures(2, 0.0), reference),
    }
    name = min(rivals, key=lambda rival: float(rivals[rival].mean()))
    assert row["rival"] == name
    own = distances(student, reference)
    gains = rivals[name] - own
    close = {"rel": 1e-4, "abs": 1e-5}
    assert row["distance"] == pytest.approx(own.mean(), **close)
    assert row["distance_se"] == pytest.approx(standard_error(own), **close)
    assert row["margin"] == pytest.approx(gains.mean(), **close)
    assert row["margin_se"] == pytest.approx(standard_error(gains), **close)
    assert abs(row["margin"]) > 1e-3, "too small for its sign to mean anything"
    assert (row["margin"] > 0) == (own.mean() < rivals[name].mean())

    mine, theirs = looked(reference), looked(student)
    kid = kernel_distance(theirs, mine)
    assert row["kid"] == pytest.approx(kid.mean, rel=1e-3, abs=1e-4)
    assert row["fid_teacher"] == pytest.approx(frechet_distance(theirs, mine), rel=1e-3)
    same_calls = [compared.row("teacher", 1, GUIDANCE), compared.row("teacher", 2, 0.0)]
    assert row["kid_margin"] == pytest.approx(min(rival["kid"] for rival in same_calls) - row["kid"], abs=1e-9)


@pytest.mark.parametrize(
    ("model", "steps", "guidance", "lora"),
    [("teacher", MANY, GUIDANCE, None), ("teacher", 2, 0.0, None), ("other", 2, 0.0, "other")],
)
def test_what_needs_no_teacher_by_hand(
    compared: Compared, model: str, steps: int, guidance: float, lora: str | None
) -> None:
    """Text match, distances to training pictures, and diversity; a row of the reference as a student's."""
    row, pictures = compared.row(model, steps, guidance), compared.pictures(steps, guidance, lora)
    real, mine = looked(training_pictures(SAMPLES, None, 16)[0]), looked(pictures)
    assert row["fid_train"] == pytest.approx(frechet_distance(mine, real), rel=1e-3)
    kid = kernel_distance(mine, real)
    assert (row["kid_train"], row["kid_train_se"]) == pytest.approx(kid, rel=1e-3)
    scorer = load_scorer("report")
    match = text_match(
        scorer, seen_by(scorer.spec, pictures, batch_size=8), [i.prompt for i in evaluation_list(SAMPLES)]
    )
    assert match is not None
    assert row["clip"] == pytest.approx(match.own.mean(), rel=1e-3, abs=1e-2)
    assert row["clip_gain"] == pytest.approx((match.own - match.shuffled).mean(), rel=1e-3, abs=1e-2)
    assert row["clip_gain"] == pytest.approx(row["clip"] - row["clip_shuffled"], abs=1e-9)
    found = compared.diversity(steps, guidance, lora)
    assert row["diversity"] == pytest.approx(found.mean(), rel=1e-3)
    assert row["diversity_se"] == pytest.approx(standard_error(found), rel=1e-2)
    assert row["diversity"] > 0.1, "pictures of different seeds differ"


def test_the_teachers_two_rows_share_four_seeds(compared: Compared) -> None:
    first, other = compared.row("teacher", MANY), compared.row("teacher, other latents")
    assert other["diversity"] == pytest.approx(first["diversity"], rel=1e-9)
    assert other["fid_train"] != first["fid_train"]


def test_further_seeds_bring_other_noise(compared: Compared) -> None:
    """The same latents by way of another offset: the same pictures, but for what a stochastic sampler adds."""
    items = evaluation_list(2)
    moved = [dataclasses.replace(item, seed=item.seed - 1000) for item in items]
    call: dict[str, Any] = {"steps": 2, "guidance": 0.0, "batch_size": 2}
    for sampler, eta, same in (("ddim", 0.0, True), ("tcd", 1.0, False)):
        first, second = (
            draw(compared.pipe, part, sampler=sampler, eta=eta, seed_offset=offset, **call)[0]
            for part, offset in ((items, 0), (moved, 1000))
        )
        assert np.array_equal(first, second) is same, sampler


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
    assert row["rival"] == "1 step, guidance 0"
    for key in ("margin", "margin_se", "kid_margin"):
        assert row[key] == pytest.approx(0.0, abs=1e-7), key
    for key in ("distance", "distance_se", "kid", "fid_teacher", *OWN):
        assert row[key] == pytest.approx(teacher[key], abs=1e-7), key


def test_the_grid_holds_the_pictures(compared: Compared) -> None:
    picture = np.asarray(Image.open(compared.output.root / "grid.png").convert("RGB"))
    columns = [
        compared.pictures(MANY, GUIDANCE),
        compared.pictures(2, GUIDANCE),
        compared.pictures(2, 0.0, "other"),
        compared.pictures(1, GUIDANCE),
        compared.pictures(1, 0.0, "same"),
    ]
    side, pitch = grid.LEAST_CELL, grid.LEAST_CELL + grid.GAP
    assert picture.shape[1] == grid.TEXT_WIDTH + len(columns) * pitch + 2 * grid.GAP
    top = picture.shape[0] - SAMPLES * pitch
    for column, images in enumerate(columns):
        left = grid.TEXT_WIDTH + grid.GAP + column * pitch
        for row, image in enumerate(images):
            cell = picture[top + row * pitch : top + row * pitch + side, left : left + side].astype(int)
            drawn = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(cell - drawn).max() <= 2, (column, row)


def test_the_report_says_the_margin(compared: Compared) -> None:
    page = (compared.output.root / "report.html").read_text(encoding="utf-8")
    row = compared.row("other")
    side = "nearer to" if row["margin"] > 0 else "farther from"
    assert f"other: 2 steps, {abs(row['margin']):.4f} ± {row['margin_se']:.4f} {side}" in page
    assert f"{MANY}-step pictures" in page
    assert page.count("data:image/png;base64,") == 1
    assert page.count("<svg") == 4 + 1  # two metrics against steps and calls, and the loss of a stage
    assert "hypersd_jax.train(" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert not list(compared.output.root.glob("*.tmp*"))
    assert not list(compared.output.root.glob(".*"))


def test_the_report_of_a_run_that_has_trained_nothing_itself(compared: Compared, tmp_path: Path) -> None:
    """All its stages are taken over from another run: there are no curves, and all the rest."""
    output = Output(tmp_path / "out")
    create_output(output, dataclasses.replace(compared.config, output_dir=str(output.root)))
    columns = {"one": np.zeros((1, 8, 8, 3), np.uint8)}
    outcome = Outcome(rows=compared.rows, columns=columns, prompts=["apple"], seeds=1, command=None, seconds=1.0)
    write_comparison(compared.config, output, outcome)
    page = (output.root / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "Loss" not in page
    assert page.count("data:image/png;base64,") == 1
    assert "other: 2 steps" in page
    assert json.loads((output.root / "results.json").read_text()) == compared.rows


def test_the_reference_is_kept_and_read_back(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    items = evaluation_list(SAMPLES)
    belonging: dict[str, Any] = {"groups": None, "guidance": GUIDANCE, "base": BASE}
    path = compared.output.root / "reference.npz"
    loaded = get_reference(None, items, batch_size=BATCH, folder=path.parent, **belonging)  # type: ignore[arg-type]
    fresh = compared.computed
    np.testing.assert_array_equal(loaded.pictures.images, fresh.pictures.images)
    kept = fresh.pictures.features.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(loaded.pictures.features, kept)
    assert loaded.values == fresh.values
    for a, b in zip((loaded.floor, *loaded.teachers), (fresh.floor, *fresh.teachers), strict=True):
        assert (a.steps, a.guidance, a.fid, a.kid, a.values) == (b.steps, b.guidance, b.fid, b.kid, b.values)
        np.testing.assert_array_equal(a.distances, b.distances.astype(np.float32))
    # It belongs to this base, list, training pictures, guidance, choice of seeds and scorer alone.
    assert load_reference(path, reference_identity(items, **belonging)) is not None
    assert load_reference(path, reference_identity(items[:-1], **belonging)) is None
    moved = [dataclasses.replace(items[0], seed=77), *items[1:]]
    assert load_reference(path, reference_identity(moved, **belonging)) is None
    for change in ({"base": "another"}, {"guidance": 5.0}, {"groups": ["animals & nature"]}):
        assert load_reference(path, reference_identity(items, **{**belonging, **change})) is None
    scorer = load_scorer("report")
    other = dataclasses.replace(scorer, params={**scorer.params, "eye.mean": scorer.params["eye.mean"] + 1.0})
    for key, value in (("DIVERSE_PROMPTS", 5), ("FURTHER_SEEDS", (1, 2)), ("load_scorer", lambda name: other)):
        with monkeypatch.context() as patch:
            patch.setattr(references, key, value)
            assert load_reference(path, reference_identity(items, **belonging)) is None


def test_a_file_without_the_values_is_another_runs(tmp_path: Path) -> None:
    """Of the time before they were kept: by its identity it is not ours, and none of it is read."""
    items = evaluation_list(SAMPLES)
    listed = json.dumps([[item.prompt, item.seed] for item in items])
    old = f"{listed}|{GUIDANCE}|{BASE}|{MANY}|{references.FEW_STEPS}"
    path = tmp_path / "reference.npz"
    np.savez(path, identity=np.asarray(hashlib.sha256(old.encode()).hexdigest()), images=np.zeros(3))
    assert load_reference(path, reference_identity(items, groups=None, guidance=GUIDANCE, base=BASE)) is None


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
    "no values": lambda path: without(path, "values"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_reference(compared: Compared, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "reference.npz"
    path.write_bytes((compared.output.root / "reference.npz").read_bytes())
    path.write_bytes(DAMAGES[damage](path))
    items = evaluation_list(SAMPLES)
    call: dict[str, Any] = {"groups": None, "guidance": GUIDANCE, "batch_size": BATCH, "base": BASE}
    with pytest.raises(UserError, match=r"reference\.npz: the reference is damaged .*delete the file"):
        get_reference(None, items, folder=tmp_path, **call)  # type: ignore[arg-type]
