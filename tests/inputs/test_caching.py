"""Training from a cache of encoded examples equals training on the images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hypersd_jax.bases import load_base
from hypersd_jax.config import Config, load_config
from hypersd_jax.data import Batch, open_source
from hypersd_jax.data.cache import Cache
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.batches import Inputs
from hypersd_jax.inputs.caching import write_cache
from hypersd_jax.stages import train
from hypersd_jax.training import make_mesh
from tests.helpers.image_sets import encoded, with_sidecars
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
STAGE = "{name: s, k: 2, solver_steps: 8, updates: 3, batch_size: 4, accumulate: 2, learning_rate: 1.0e-2}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(recipe(folder, model), folder / "c", batch_size=100, shard_rows=1000)
    return folder / "c"


def recipe(folder: Path, model: Path, *overrides: str, name: str = "out") -> Config:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(output=folder / name, model=model, stage=STAGE))
    return load_config(path, overrides)


def batches(config: Config, way: str) -> list[Any]:
    """The first two batches of the run's stage, as the step gets them."""
    base = load_base(config.model.source, dtype=np.float32)
    source = open_source(config.data, resolution=16, seed=config.seed)
    inputs = Inputs(config, source, base, make_mesh(1, 1))
    stage = config.stages[0]
    also = {"read": _lengths} if way == "conditioned" else {}
    loaded = getattr(inputs, way)(stage, before=6, done=1, key=jax.random.key(5), **also)
    return [(number, jax.device_get(batch)) for number, batch, _ in itertools.islice(loaded, 2)]


def _lengths(captions: Sequence[str], images: Batch | None) -> dict[str, Any]:
    """What a step may read of the captions besides the model's conditioning."""
    return {"lengths": np.asarray([[len(caption)] for caption in captions])}


@pytest.mark.parametrize("way", ["conditioned", "captioned"])
def test_a_stage_gets_the_same_numbers_either_way(way, model, cache, tmp_path):
    encoded = batches(recipe(tmp_path, model), way)
    read = batches(recipe(tmp_path, model, f"data.cache={cache}"), way)
    assert [number for number, _ in encoded] == [number for number, _ in read] == [2, 3]
    assert jax.tree.structure(encoded) == jax.tree.structure(read)
    assert encoded[0][1]["latents"].shape == (2, 2, 8, 8, 4)
    assert way == "captioned" or encoded[0][1]["lengths"].shape == (2, 2, 1)
    assert not np.array_equal(encoded[0][1]["latents"], encoded[1][1]["latents"])
    for a, b in zip(jax.tree.leaves(encoded), jax.tree.leaves(read), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


def test_the_cache_holds_every_image_on_every_background(model, cache):
    found = Cache(cache, verify=True)
    config = recipe(cache.parent, model)
    assert found.metadata["data"]["resolution"] == 16
    assert "groups" not in found.metadata["data"]
    assert set(found.names) == {"mean", "logvar", "context", "ids_0", "sizes"}
    source = open_source(config.data, resolution=16, seed=0)
    assert len(found) == 8 * len(source)
    assert found.rows(source.keys(np.arange(50)))["mean"].shape == (50, 8, 8, 4)


def test_what_is_refused(model, cache, tmp_path):
    with pytest.raises(UserError, match=r"data.cache: .*c: the cache was made with resolution 16, this run has 8"):
        train(recipe(tmp_path, model, f"data.cache={cache}", "data.resolution=8"))
    with pytest.raises(UserError, match=r"data.cache: .*nowhere: not a cache"):
        train(recipe(tmp_path, model, f"data.cache={tmp_path / 'nowhere'}"))
    with pytest.raises(UserError, match="is not in the cache"):
        train(recipe(tmp_path, model, f"data.cache={cache}", "data.groups=[objects]"))


def test_a_run_trains_from_it_where_only_the_schedule_differs(cache, tmp_path):
    other = tiny_model(tmp_path / "other", "v_prediction")
    folder = train(recipe(tmp_path, other, f"data.cache={cache}"))
    assert (folder / "loras" / "s.safetensors").is_file()


def test_a_changed_caption_is_another_set(tmp_path):
    from PIL import Image

    from hypersd_jax.config import DataConfig

    names = []
    for caption in ("a cat", "a dog"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
        (tmp_path / "a.txt").write_text(caption)
        source = open_source(DataConfig(source=str(tmp_path)), resolution=16, seed=0)
        names.append(source.identity)
    assert names[0] != names[1]


def test_a_cache_of_images_that_were_replaced_is_refused(model: Path, tmp_path: Path) -> None:
    folder = with_sidecars(tmp_path / "set", range(3))
    config = recipe(tmp_path, model, "data.groups=null", "data.white_fraction=0.5", f"data={folder}")
    write_cache(config, tmp_path / "cache", batch_size=4)
    again = recipe(
        tmp_path,
        model,
        "data.groups=null",
        "data.white_fraction=0.5",
        f"data={folder}",
        f"data.cache={tmp_path / 'cache'}",
    )
    (folder / "1.png").write_bytes(encoded(5))
    with pytest.raises(UserError, match="the cache was made with images' sizes and times "):
        train(again)
    with pytest.raises(UserError, match="the cache was made with images' sizes and times "):
        write_cache(config, tmp_path / "cache", batch_size=4)
    assert not (tmp_path / "out").exists()
