"""The cache of encoded rows: what is written is read back, after any interruption, and nothing else is."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from hypersd_jax.data.cache import MANIFEST, Cache, CacheWriter
from hypersd_jax.errors import UserError
from hypersd_jax.weights.tensors import save_tensors

KEYS = np.asarray([7, 3, 11, 5, 2, 13, 1], np.int64)
METADATA = {"vae": "abc", "data": {"source": "emoji", "resolution": 64}}


def rows(keys):
    base = np.asarray(keys, np.float32)[:, None, None] + np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    return {"mean": base, "context": base.astype(ml_dtypes.bfloat16), "ids": np.asarray(keys, np.int32)[:, None]}


def fill(folder, *, shards=99, metadata=METADATA):
    writer = CacheWriter(folder, metadata, KEYS, shard_rows=3)
    for number, keys in enumerate(writer.missing()):
        if number == shards:
            break
        writer.write(rows(keys))
    return writer


def test_rows_come_back_by_key_in_the_order_asked_for(tmp_path):
    fill(tmp_path / "c")
    cache = Cache(tmp_path / "c", verify=True)
    assert len(cache) == 7
    cache.require(METADATA)
    asked = np.asarray([1, 7, 7, 13])
    found, wanted = cache.rows(asked), rows(asked)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        np.testing.assert_array_equal(found[name], wanted[name])
    with pytest.raises(UserError, match="row 4 is not in the cache"):
        cache.rows(np.asarray([1, 4]))
    cache.require_rows(KEYS)
    with pytest.raises(UserError, match="row 4 is not in the cache, one of 2 that are missing"):
        cache.require_rows(np.asarray([1, 99, 4]))


def test_an_interrupted_cache_is_refused_and_gone_on_with(tmp_path):
    folder = tmp_path / "c"
    assert fill(folder, shards=1).done == 3
    (folder / ".shard-00001.safetensors.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match=r"3 of 7 rows are there; run `hypersd cache` to the end"):
        Cache(folder)
    first = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    assert fill(folder).done == 7
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert not list(folder.glob(".*"))
    np.testing.assert_array_equal(Cache(folder, verify=True).rows(KEYS)["mean"], rows(KEYS)["mean"])


def test_another_model_or_data_set_is_named(tmp_path):
    fill(tmp_path / "c")
    with pytest.raises(UserError, match="made with vae 'abc', this run has 'abd'"):
        Cache(tmp_path / "c").require({"vae": "abd"})
    with pytest.raises(UserError, match="made with resolution 64, this run has 32"):
        fill(tmp_path / "c", metadata={**METADATA, "data": {"source": "emoji", "resolution": 32}})
    with pytest.raises(UserError, match="made with keys"):
        CacheWriter(tmp_path / "c", METADATA, KEYS[::-1], shard_rows=3)


def test_damage_is_named(tmp_path):
    folder = tmp_path / "c"
    with pytest.raises(UserError, match=r"not a cache \(manifest.json is missing\)"):
        Cache(folder)
    fill(folder)
    path = folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    Cache(folder)
    with pytest.raises(UserError, match=r"shard-00001.safetensors: damaged, its checksum"):
        Cache(folder, verify=True)
    path.write_bytes(whole[:40])
    with pytest.raises(UserError, match=r"shard-00001.safetensors: is truncated within its header"):
        Cache(folder)
    save_tensors(path, {"mean": np.zeros((3, 2), np.float32)})
    with pytest.raises(UserError, match=r"shard-00001.safetensors: has 0 rows, the manifest says 3"):
        Cache(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00001.safetensors: no such file"):
        Cache(folder)
    for content in ("{", json.dumps({"version": 1}), "[1]"):
        (folder / MANIFEST).write_text(content)
        with pytest.raises(UserError, match=r"manifest.json: not a cache's manifest"):
            Cache(folder)
    (folder / MANIFEST).write_text(json.dumps({"version": 2}))
    with pytest.raises(UserError, match="version 2"):
        Cache(folder)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match="holds something that is not a cache"):
        fill(tmp_path / "file")
    other = tmp_path / "other"
    other.mkdir()
    (other / "holiday.png").write_bytes(b"x")
    with pytest.raises(UserError, match="holds something that is not a cache"):
        fill(other)
    assert sorted(path.name for path in other.iterdir()) == ["holiday.png"]


def test_numbers_that_are_not_finite_are_not_kept(tmp_path):
    writer = CacheWriter(tmp_path / "c", METADATA, KEYS, shard_rows=3)
    bad = rows(KEYS[:3])
    bad["mean"][1, 0, 0] = np.nan
    with pytest.raises(UserError, match="mean of shard 0 is not finite"):
        writer.write(bad)
    assert writer.done == 0
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [MANIFEST]
