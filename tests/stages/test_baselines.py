"""Stages of the methods that TSCD is compared with: trained, exported and sampled as their papers do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hypersd_jax.config import ConsistencyStage, load_config
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import train
from hypersd_jax.stages.export import sampling_header
from hypersd_jax.weights.tensors import open_tensors
from tests.helpers.score_runs import open_stage
from tests.helpers.tiny_model import SCHEDULER

RECIPE = """
output_dir: {output}
model: {model}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 4}}
log: {{checkpoint_every: 2, tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
"""
STAGE = (
    "  - {{name: {kind}, kind: {kind}, k: {k}, solver_steps: 8, updates: 2, batch_size: 4, learning_rate: 1.0e-2,"
    " guidance: [2, 4], ema: 0.5}}\n"
)
STEPS = {"lcm": 1, "pcm": 4}
SAMPLERS = {"lcm": "lcm", "pcm": "ddim"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "recipe.yaml"
    stages = "".join(STAGE.format(kind=kind, k=k) for kind, k in STEPS.items())
    path.write_text(RECIPE.format(output=folder / "out", model=model) + stages)
    (folder / "out" / "loras").mkdir(parents=True)
    (folder / "out" / "loras" / f".lcm.safetensors.{'0' * 32}.tmp").touch()  # as a killed process leaves one
    return train(load_config(path))


def test_a_run_of_both(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [(kind, n) for kind in SAMPLERS for n in (1, 2)]
    for line in lines:
        assert line["skipped"] == 0
        assert line["loss"] > 0
        assert line["update_norm"] > 0


def test_a_student_says_how_its_method_samples(finished: Path, model: Path) -> None:
    pipe = Pipeline.from_pretrained(model)
    for kind, sampler in SAMPLERS.items():
        path = finished / "loras" / f"{kind}.safetensors"
        with open_tensors(path) as file:
            assert file.metadata["sampler"] == sampler
            assert file.metadata["steps"] == str(STEPS[kind])
            assert file.metadata["original_inference_steps"] == "8"
            assert file.metadata["ss_training_comment"].startswith(f"hypersd_jax {kind} ")
        pipe.load_lora(path)
        sampled = pipe("red apple", output="latent")
        explicit = pipe("red apple", output="latent", steps=STEPS[kind], sampler=sampler, eta=0.0, guidance=0.0)
        np.testing.assert_array_equal(sampled, explicit)
        assert np.all(np.isfinite(sampled))
        pipe.unload_lora()


def test_a_killed_export_leaves_nothing(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "loras").glob("*.safetensors")) == [
        "lcm.safetensors",
        "pcm.safetensors",
    ]


def stage(kind: str, k: int) -> ConsistencyStage:
    return ConsistencyStage(name="a", kind=kind, updates=1, batch_size=1, solver_steps=8, k=k)


def test_tcd_is_tscd_with_one_segment(tmp_path: Path, model: Path) -> None:
    """The same program on the same numbers; what differs is how the student says it samples."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "out", model=model) + STAGE.format(kind="tcd", k=1))
    opened = open_stage(load_config(path))
    programs = []
    for kind in ("tcd", "tscd"):
        settings = dataclasses.replace(opened.stage, kind=kind, sampler="auto")
        batch = jax.tree.map(lambda leaf: leaf[None], opened.batch)
        lowered = opened.run.step.lower(opened.state(), opened.frozen, batch, jax.random.key(0), settings)
        programs.append(lowered.as_text())
    assert programs[0] == programs[1]
    headers = [sampling_header(stage(kind, 1), SCHEDULER) for kind in ("tcd", "tscd")]
    assert [header["sampler"] for header in headers] == ["tcd", "ddim"]
    assert headers[0]["timesteps"] == headers[1]["timesteps"] == "[999]"


def test_stages_of_a_method_share_one_compiled_step() -> None:
    """Other numbers are the same tree of arguments; another method is another."""

    def shape(kind: str, k: int, **settings: Any) -> Any:
        leaves, structure = jax.tree.flatten(dataclasses.replace(stage(kind, k), **settings))
        return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)

    like = {"learning_rate": 0.5, "solver_steps": 40, "guidance": (2.0, 3.0), "ema": 0.1, "updates": 7, "name": "b"}
    assert shape("tscd", 8) == shape("tscd", 1) == shape("tscd", 4, **like)
    assert shape("pcm", 8) == shape("pcm", 1, batch_size=5, eta=0.5, export="raw", teacher="previous")
    others = [shape("tscd", 1, **each) for each in ({"distance": "pseudo_huber"}, {"guidance": (1.0, 1.0)})]
    assert len({shape("tscd", 1), shape("pcm", 1), shape("lcm", 1), *others}) == 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.k=2", "stages.0.k must be 1 for kind=tcd, which has no segments, not 2"),
        ("stages.0.kind=ctm", "stages.0.kind='ctm' is not valid; "),
        ("stages.0.sampler=euler", "stages.0.sampler='euler' is not valid; "),
    ],
)
def test_what_is_refused(tmp_path: Path, override: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "out", model="embedded") + STAGE.format(kind="tcd", k=1))
    with pytest.raises(UserError, match=words):
        load_config(path, [override])


def test_eta_belongs_to_tcd(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "out", model=model) + STAGE.format(kind="lcm", k=1))
    with pytest.raises(UserError, match=r"stages\.lcm\.eta=0\.3: the lcm sampler has no eta"):
        train(load_config(path, ["stages.0.eta=0.3"]))
    assert not (tmp_path / "out").exists()
