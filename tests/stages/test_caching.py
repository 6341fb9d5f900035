"""Training from a cache of encoded rows is training on the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hypersd_jax.config import Config, load_config
from hypersd_jax.data.cache import Cache
from hypersd_jax.errors import UserError
from hypersd_jax.stages import train
from hypersd_jax.stages.caching import write_cache
from tests.helpers.tiny_model import tiny_model

RECIPE = """
output_dir: {output}
model: {model}
data: {{source: emoji, resolution: 16, groups: [activities], white_fraction: 0.5}}
lora: {{rank: 4}}
log: {{tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
  - {stage}
"""
STAGES = {
    "tscd": "{name: s, k: 2, solver_steps: 8, updates: 3, batch_size: 4, accumulate: 2, learning_rate: 1.0e-2}",
    "teacher": "{name: s, kind: teacher, updates: 3, batch_size: 4, accumulate: 2, learning_rate: 1.0e-3}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(recipe(folder, model), folder / "c", batch_size=100, shard_rows=1000)
    return folder / "c"


def recipe(folder: Path, model: Path, *overrides: str, kind: str = "tscd", name: str = "out") -> Config:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(output=folder / name, model=model, stage=STAGES[kind]))
    return load_config(path, overrides)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", STAGES)
def test_a_run_sees_the_same_numbers_either_way(kind, model, cache, tmp_path):
    encoded = metrics(train(recipe(tmp_path, model, kind=kind, name="encoded")))
    read = metrics(train(recipe(tmp_path, model, f"data.cache={cache}", kind=kind, name="read")))
    assert len(encoded) == len(read) == 3
    for a, b in zip(encoded, read, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)


def test_the_cache_holds_every_picture_on_every_ground(model, cache):
    found = Cache(cache, verify=True)
    config = recipe(cache.parent, model)
    assert found.facts["data"]["resolution"] == 16
    assert "groups" not in found.facts["data"]
    assert set(found.names) == {"mean", "logvar", "context", "ids_0", "sizes"}
    from hypersd_jax.data import open_source

    source = open_source(config.data, resolution=16, seed=0)
    assert len(found) == 8 * len(source)
    assert found.rows(source.keys(np.arange(50)))["mean"].shape == (50, 8, 8, 4)


def test_what_is_refused(model, cache, tmp_path):
    with pytest.raises(UserError, match=r"data.cache: .*c: the cache was made with resolution 16, this run has 8"):
        train(recipe(tmp_path, model, f"data.cache={cache}", "data.resolution=8"))
    other = tiny_model(tmp_path / "other", "v_prediction")
    train(recipe(tmp_path, other, f"data.cache={cache}", name="same weights"))
    with pytest.raises(UserError, match=r"data.cache: .*nowhere: not a cache"):
        train(recipe(tmp_path, model, f"data.cache={tmp_path / 'nowhere'}"))
    with pytest.raises(UserError, match="is not in the cache"):
        train(recipe(tmp_path, model, f"data.cache={cache}", "data.groups=[objects]"))
