"""Training on a dataset of one's own ends with numbers, a grid and a page, as it does on the embedded images."""

from __future__ import annotations

import contextlib
import io
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

from hypersd_jax.cli import main
from hypersd_jax.config import Config, load_config
from hypersd_jax.evaluation import diversity, features, generator, read_strip
from hypersd_jax.evaluation import samples as samples_module
from hypersd_jax.evaluation.comparison import SETS_LEAST, dataset_evaluator
from hypersd_jax.evaluation.reference import few_samplings
from hypersd_jax.evaluation.run_comparison import compare_run, natural
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import train
from hypersd_jax.stages.export import export_model, export_student
from hypersd_jax.training.output import Output, create_output
from tests.helpers.lora_files import random_adapter
from tests.helpers.short_runs import share_steps
from tests.helpers.small_features import small_features
from tests.helpers.tiny_xl import tiny_xl

CAPTIONS = ("a red <b>square</b>", "b " * 300, "$5_to_$6 \N{GRINNING FACE} & more", "\N{ARABIC LETTER SEEN} d", "plain")
SAMPLES, MANY = 7, 6
RECIPE = f"""
output_dir: {{output}}
seed: 3
model: {{model}}
data: {{{{source: {{data}}, resolution: 16}}}}
lora: {{{{rank: 4}}}}
log: {{{{tensorboard: false, compilation_cache: false, sample_every: 1}}}}
evaluation: {{{{samples: {SAMPLES}, batch_size: 4}}}}
stages:
  - {{{{name: tscd-16, k: 2, solver_steps: 4, updates: 3, batch_size: 4, learning_rate: 1.0e-2, ema: 0.5}}}}
"""
# One of the captions is as long as captions get.
pytestmark = pytest.mark.filterwarnings("ignore:.* longer than")


def looked(images: np.ndarray) -> np.ndarray:
    return features(images, batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with small_features() as patch:
        patch.setattr(generator, "MANY_STEPS", MANY)
        patch.setattr(samples_module, "SEEN_AT_A_TIME", 8)
        yield


class Trained(NamedTuple):
    """A run through the command line: its folder, what it printed, and what was typed."""

    folder: Path
    model: Path
    printed: str
    arguments: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "results.json").read_text())

    @property
    def page(self) -> str:
        return (self.folder / "report.html").read_text(encoding="utf-8")


def own_folder(folder: Path) -> Path:
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (20, 20), (40 * number, 0, 255)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small: None, model: Path) -> Trained:
    root = tmp_path_factory.mktemp("own")
    data = own_folder(root / "my images")
    (root / "recipe.yaml").write_text(RECIPE.format(output=root / "out", model=model, data=data))
    arguments = ["train", "--config", str(root / "recipe.yaml"), "log.every=1"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        main(arguments)
    return Trained(root / "out", model, printed.getvalue(), arguments)


def test_what_is_left_and_printed(trained: Trained) -> None:
    lines = trained.printed.splitlines()
    assert max(map(len, lines)) <= 120 or any(str(trained.folder) in line for line in lines if len(line) > 120)
    assert lines[0].split()[:5] == ["model", "steps", "guidance", "calls", "distance"]
    assert any(line.startswith("tscd-16") for line in lines)
    for name in ("results.json", "grid.png", "report.html"):
        assert (trained.folder / name).is_file()
        assert any(line.endswith(str(trained.folder / name)) for line in lines)
    assert not [path for path in trained.folder.iterdir() if ".tmp" in path.name]


def samples(trained: Trained, steps: int, guidance: float, lora: str | None = None) -> np.ndarray:
    """Of the captions in turn, uint8, in one batch, from latents made here."""
    pipe = Pipeline.from_pretrained(trained.model)
    if lora is not None:
        pipe.load_lora(trained.folder / "loras" / f"{lora}.safetensors")
    latents = np.stack([jax.random.normal(jax.random.key(seed), (8, 8, 4), jnp.float32) for seed in range(SAMPLES)])
    prompts = [CAPTIONS[seed % len(CAPTIONS)].strip() for seed in range(SAMPLES)]
    call: dict[str, Any] = {"steps": steps, "guidance": guidance, "sampler": "ddim", "eta": 0.0, "stepwise": True}
    return np.round(pipe(prompts, latents=latents, output="np", **call) * 255).astype(np.uint8)


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean((a / 255.0 - b / 255.0) ** 2, axis=(1, 2, 3)))


def clustered(values: np.ndarray) -> float:
    """The standard error where samples of one caption are alike."""
    sums = [np.sum((values - values.mean())[place :: len(CAPTIONS)]) for place in range(len(CAPTIONS))]
    count = len(CAPTIONS)
    return float(np.sqrt(count / (count - 1) * np.sum(np.square(sums))) / len(values))


def test_the_rows_by_hand(trained: Trained) -> None:
    rows = trained.rows
    assert [(row["model"], row["steps"], row["guidance"], row["calls"]) for row in rows] == [
        ("teacher", MANY, 7.5, 2 * MANY),
        ("teacher, other latents", MANY, 7.5, 2 * MANY),
        ("teacher", 2, 7.5, 4),
        ("teacher", 1, 7.5, 2),
        ("teacher", 2, 0.0, 2),
        ("teacher", 1, 0.0, 1),
        ("tscd-16", 2, 0.0, 2),
    ]
    many, student = samples(trained, MANY, 7.5), samples(trained, 2, 0.0, "tscd-16")
    own, row, close = apart(student, many), rows[-1], {"rel": 2e-3, "abs": 1e-5}
    assert row["distance"] == pytest.approx(own.mean(), **close)
    assert row["distance_se"] == pytest.approx(clustered(own), **close)
    baselines = {"1 step, guidance 7.5": samples(trained, 1, 7.5), "2 steps, guidance 0": samples(trained, 2, 0.0)}
    gains = {name: apart(images, many) - own for name, images in baselines.items()}
    nearest = min(gains, key=lambda name: float(gains[name].mean()))
    assert row["baseline"] == nearest
    assert row["margin"] == pytest.approx(gains[nearest].mean(), rel=1e-2, abs=1e-5)
    assert row["margin_se"] == pytest.approx(clustered(gains[nearest]), rel=1e-2, abs=1e-5)
    # Captions 0 and 1 have two seeds each, and only they say something of diversity and of other latents.
    seen = looked(student)
    expected = diversity(np.stack([seen[:2], seen[5:7]], axis=1))
    assert row["diversity"] == pytest.approx(expected.mean(), rel=5e-3)
    assert rows[1]["distance"] == pytest.approx(apart(many[:2], many[5:7]).mean(), **close)
    assert rows[1]["n"] == 4
    for row in rows:
        assert not {"fid_teacher", "kid", "fid_train", "clip"} & row.keys()
        assert row["seconds_per_image"] > 0


def test_the_page(trained: Trained) -> None:
    page = trained.page
    assert re.search(r"Made \d{4}-\d\d-\d\d \d\d:\d\d \S+ with hypersd_jax \d+\.\d+\.\d+, jax \d+\.\d+", page)
    for name, value in (("seed", "3"), ("seeds of the samples", f"0 to {SAMPLES - 1}")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    assert re.search(r"<dt>training</dt><dd>[\d.]+ (s|min)", page)
    assert re.search(r"<dt>comparison</dt><dd>[\d.]+ (s|min)", page)
    assert re.search(r"<dt>tscd-16</dt><dd>k 2, .*; trained in ", page)
    assert f'<pre tabindex="0">hypersd train --config {trained.arguments[2]} log.every=1</pre>' in page
    assert "a red &lt;b&gt;square&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "FID and KID are left out" in page
    assert "Text match is left out" in page
    assert f"<dt>protocol</dt><dd>{trained.rows[0]['protocol']}</dd>" in page
    assert page.count("<svg") >= 2 + 1
    assert "Loss: tscd-16" in page
    assert not re.search(r"https?:|<link|<script|@import", page)
    order = [page.index(f"Training captions: {name}<") for name in ("tscd-16-000001", "tscd-16-000002", "tscd-16")]
    assert order == sorted(order)


def test_the_strips_hold_their_prompts(trained: Trained) -> None:
    strip = read_strip(trained.folder / "samples" / "tscd-16.png")
    assert [sample.prompt for sample in strip] == [caption.strip() for caption in CAPTIONS]
    assert {sample.image.size for sample in strip} == {(16, 16)}


def test_again_and_taken_over(trained: Trained, tmp_path: Path) -> None:
    """A rerun has the same numbers and the same time of training; a run that takes all over has a page as well."""
    before, spent = trained.rows, re.search(r"<dt>training</dt><dd>([^<]*)", trained.page)
    (trained.folder / "report.html").unlink()
    train(load_config(trained.folder / "config.yaml"))
    timed = [{key: value for key, value in row.items() if key != "seconds_per_image"} for row in trained.rows]
    assert timed == [{key: value for key, value in row.items() if key != "seconds_per_image"} for row in before]
    assert spent is not None
    assert spent.group() in trained.page
    assert "hypersd_jax.train(" in trained.page
    overrides = [f"output_dir={tmp_path / 'out'}", f"reuse={trained.folder}"]
    folder = train(load_config(trained.folder / "config.yaml", overrides))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not (folder / "metrics.jsonl").exists()
    assert f"reused from {trained.folder}" in page
    assert [row["distance"] for row in json.loads((folder / "results.json").read_text())] == [
        row["distance"] for row in before
    ]


def settings(folder: Path, model: Path, stages: str, *overrides: str) -> Config:
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in CAPTIONS))
    recipe = folder / "recipe.yaml"
    head, _, _ = RECIPE.partition("stages:")
    recipe.write_text(head.format(output=folder / "out", model=model, data=data) + f"stages:\n{stages}\n")
    return load_config(recipe, overrides)


def test_a_unified_lora_and_a_one_step_unet_of_an_xl_model(tmp_path: Path) -> None:
    """Of prompts alone; SDXL's teacher is guided by 5, and a stage may be compared at several numbers of steps."""
    model = tiny_xl(tmp_path / "model")
    common = "kind: dmd, updates: 1, batch_size: 2, data_free: true"
    stages = f"""
  - {{name: unified, times: [999], steps: [1, 3], {common}}}
  - {{name: one, student: unet, times: [800], steps: [1], sampler: lcm, {common}}}"""
    config = settings(tmp_path, model, stages, "evaluation.samples=3")
    output, pipe = Output(Path(config.output_dir)), Pipeline.from_pretrained(model)
    create_output(output, config)
    adapter = random_adapter(pipe.base.components.unet.shapes, 1, scale=0.5)
    unified, _ = config.adapter_stages
    export_student(output.loras / "unified.safetensors", adapter, unified, pipe.base, base_fingerprint="x")
    export_model(output.models / "one", pipe.base)
    rows = compare_run(config, output, pipe, "x", prompts=CAPTIONS)
    assert [(row["model"], row["steps"], row["guidance"]) for row in rows] == [
        ("teacher", MANY, 5.0),
        *[("teacher", steps, guidance) for guidance in (5.0, 0.0) for steps in (3, 1)],
        ("unified", 1, 0.0),
        ("unified", 3, 0.0),
        ("one", 1, 0.0),
    ]
    assert all("diversity" not in row for row in rows), "each caption has one seed"
    assert all(row["baseline"] for row in rows[5:])
    page = (output.root / "report.html").read_text(encoding="utf-8")
    assert "<bdi>unified</bdi>" in page
    assert "<bdi>students: one</bdi>" in page


def test_what_the_teacher_is_compared_at() -> None:
    stages = [{"name": name, "k": k, "updates": 1, "batch_size": 1} for name, k in (("a", 8), ("b", 5))]
    samplings = [sampling for stage in load_config_of(stages).adapter_stages for sampling in stage.samplings]
    assert few_samplings(samplings, 7.5) == ((8, 7.5), (5, 7.5), (4, 7.5), (8, 0.0), (5, 0.0), (4, 0.0))
    assert few_samplings(samplings, 1.0) == ((8, 1.0), (5, 1.0), (4, 1.0))


def load_config_of(stages: list[dict[str, Any]], **more: Any) -> Config:
    from hypersd_jax.config import build

    return build(Config, {"output_dir": "out", "data": "images", "model": "somewhere", "stages": stages, **more})


def test_defaults() -> None:
    stages = [{"name": "a", "k": 8, "updates": 1, "batch_size": 1}]
    own = load_config_of(stages)
    assert (own.compared_samples, own.evaluation.guidance) == (16, None)
    assert load_config_of(stages, evaluation={"samples": 5}).compared_samples == 5
    assert load_config_of(stages, evaluation={"samples": 0}).compared_samples == 0
    assert load_config_of(stages, evaluation={"guidance": 3.0}).evaluation.guidance == 3.0
    assert load_config_of(stages, model="embedded").evaluation.guidance == 4.0
    emoji = load_config_of(stages, data="emoji")
    assert (emoji.compared_samples, emoji.evaluation.guidance) == (256, 4.0)


def test_few_samples_have_no_distance_of_sets_and_known_words_have_a_match(trained: Trained) -> None:
    pipe = Pipeline.from_pretrained(trained.model)
    assert dataset_evaluator(pipe, CAPTIONS, 4).least == SETS_LEAST
    assert dataset_evaluator(pipe, CAPTIONS, 4).scorer is None
    assert dataset_evaluator(pipe, ["red apple, noto style", "lion, blob style"], 4).scorer is not None
    one = dataset_evaluator(pipe, ["a photo of a dog"] * 8, 5)
    assert [item.seed for item in one.items] == [0, 1, 2, 3, 4]
    assert {item.prompt for item in one.items} == {"a photo of a dog"}
    assert one.further == ()


def test_only_the_first_process_writes(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(trained.folder / "config.yaml", [f"output_dir={tmp_path / 'out'}"])
    output = Output(tmp_path / "out")
    create_output(output, config)
    (output.root / "loras" / "tscd-16.safetensors").write_bytes(
        (trained.folder / "loras" / "tscd-16.safetensors").read_bytes()
    )
    before = sorted(output.root.rglob("*"))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    compare_run(config, output, Pipeline.from_pretrained(trained.model), "x", prompts=CAPTIONS)
    assert sorted(output.root.rglob("*")) == before


def test_natural_order() -> None:
    names = ["tscd-16", "tscd-8-001000", "tscd-2", "tscd-8-000200", "a10b", "a9b", "unified"]
    assert sorted(names, key=natural) == [
        "a9b",
        "a10b",
        "tscd-2",
        "tscd-8-000200",
        "tscd-8-001000",
        "tscd-16",
        "unified",
    ]
