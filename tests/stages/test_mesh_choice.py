"""Over how many devices `mesh.fsdp: auto` splits a model: as few as it fits."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from hypersd_jax.stages.mesh_choice import choose_mesh
from tests.helpers.score_runs import recipe
from tests.helpers.tiny_model import tiny_model

STAGE = "  - {name: one, k: 2, solver_steps: 8, updates: 1, batch_size: 8, learning_rate: 1.0e-3}"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice")
    return recipe(folder, tiny_model(folder / "model"), STAGE, "mesh.fsdp=auto", "lora.rank=64")


@pytest.fixture(autouse=True)
def split_everything(monkeypatch):
    monkeypatch.setattr("hypersd_jax.weights.placement.SHARD_ABOVE_BYTES", 1024)


def test_as_few_devices_as_half_of_the_memory_holds(config):
    found = [choose_mesh(config, 8, 2.0**power, jnp.float32) for power in range(30, 9, -1)]
    split = [each.fsdp for each in found]
    assert split == sorted(split)
    assert list(dict.fromkeys(split)) == [1, 2, 4, 8]
    assert all(each.data * each.fsdp == 8 for each in found)
    assert str(found[0].reason).startswith(
        "mesh: 8 x 1 (data x fsdp): weights and training state take 0.0 GiB of the 1.0"
    )
    assert str(found[-1].reason).endswith("where they are not split")


def test_beside_an_explicit_data_all_devices_work(config):
    meshed = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=2))
    found = choose_mesh(meshed, 8, 1e12, jnp.float32)
    assert (found.data, found.fsdp, found.reason) == (2, 4, None)


@pytest.mark.parametrize(("count", "memory", "shape"), [(1, 1e3, (1, 1)), (8, None, (1, 8)), (6, 1e3, (3, 2))])
def test_nothing_to_choose(config, count, memory, shape):
    found = choose_mesh(config, count, memory, jnp.float32)
    assert (found.data, found.fsdp) == shape
    assert (found.reason is None) == (count != 6)
