"""Saving, restoring bit for bit, and every way in which a folder can be wrong; kills are in test_kill.py."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

from hypersd_jax import training
from hypersd_jax.errors import UserError
from tests.helpers import toy_training as toy

# Orbax's own event loop complains when a load fails half-way.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

METADATA = {"stage": "tscd-8", "base": "sha256:0123", "config": "sha256:4567", "data": {"epoch": 1, "row": 48}}


@pytest.fixture
def run():
    return toy.Run()


def like(run: toy.Run):
    return training.abstract(run.mesh, run.state)


def test_resuming_is_bit_identical(run, tmp_path):
    run.go(3)
    with training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(3, run.state, METADATA)
        run.go(3)  # donates what is still being written
    uninterrupted = jax.device_get(run.state)

    resumed = toy.Run()
    with training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest() == 3
        assert checkpointer.metadata() == METADATA
        resumed.state, metadata = checkpointer.restore(None, like(resumed))
    assert metadata == METADATA
    assert int(resumed.state.step) == 3
    resumed.go(3)
    toy.assert_same(resumed.state, uninterrupted)


def test_only_the_newest_stay_and_an_older_one_can_be_chosen(run, tmp_path):
    with training.Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest() is None
        for step in (1, 2, 3):
            run.go(1)
            checkpointer.save(step, run.state, {"step": step})
        assert checkpointer.latest() == 3
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
        state, metadata = checkpointer.restore(2, like(run))
        assert (int(state.step), metadata) == (2, {"step": 2})
        with pytest.raises(UserError, match=r"step 1 .*\[2, 3\]"):
            checkpointer.restore(1, like(run))


def test_a_step_can_be_saved_again(run, tmp_path):
    """As after going back to an older checkpoint."""
    with training.Checkpointer(tmp_path, keep=3) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, run.state, {"round": 1})
        checkpointer.save(1, run.state, {"round": 2})
        assert checkpointer.metadata(1) == {"round": 2}
        assert checkpointer.metadata(2) == {"round": 1}


def test_an_empty_folder_is_named(run, tmp_path):
    with training.Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError, match=str(tmp_path)):
        checkpointer.restore(None, like(run))


def test_metadata_must_be_json(run, tmp_path):
    with training.Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError):
        checkpointer.save(1, run.state, {"key": object()})


def test_unfinished_folders_are_not_checkpoints(run, tmp_path):
    with training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, run.state, METADATA)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "2.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    with training.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest() == 1
        checkpointer.save(3, run.state, METADATA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def damage_nothing_left(folder):
    for path in list(folder.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def damage_no_arrays(folder):
    shutil.rmtree(folder / "state" / "d")


def damage_no_tree(folder):
    (folder / "state" / "_METADATA").unlink()


def damage_no_metadata(folder):
    (folder / "_CHECKPOINT_METADATA").unlink()


def damage_cut_short(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_one_byte(folder):
    (path,) = (path for path in (folder / "state" / "d").iterdir() if path.is_file())
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [damage_nothing_left, damage_no_arrays, damage_no_tree, damage_no_metadata, damage_cut_short, damage_one_byte],
)
def test_a_damaged_checkpoint_is_named(run, tmp_path, damage):
    with training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, run.state, METADATA)
    damage(tmp_path / "4")
    with training.Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError, match=f"{tmp_path}.*damaged"):
        checkpointer.restore(4, like(run))


def test_a_swapped_value_is_noticed(run, tmp_path, monkeypatch):
    """The checksum is over the values, so it also guards what the file format does not."""
    with training.Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr("hypersd_jax.training.checkpoints._checksum", lambda state: 12345)
            checkpointer.save(1, run.state, METADATA)
        with pytest.raises(UserError, match="checksum"):
            checkpointer.restore(1, like(run))


def test_another_shape_is_named_by_leaf(run, tmp_path):
    with training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, run.state, METADATA)
        with pytest.raises(UserError, match=r"ema/student/first/bias is float32\[16\] there, float32\[32\] here"):
            checkpointer.restore(1, like(toy.Run(width=32)))


def test_metadata_are_compared_by_name():
    training.check_metadata(METADATA, {"stage": "tscd-8", "base": "sha256:0123"})
    with pytest.raises(UserError, match="config is 'sha256:4567' there, 'sha256:9' here") as raised:
        training.check_metadata(METADATA, {"config": "sha256:9", "rank": 64, "stage": "tscd-8"})
    assert "rank is 'absent' there, 64 here" in str(raised.value)
    assert "stage" not in str(raised.value)


def test_restored_values_keep_every_bit(run, tmp_path):
    """Subnormals, signed zeros, infinities and nan payloads included."""
    odd = np.array([0x80000000, 1, 0x7F800000, 0x7FC12345, 0x00400000], np.uint32).view(np.float32)
    state = training.init_state({"odd": odd}, toy.SETTINGS, averaged=("odd",))
    with training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, METADATA)
        restored, _ = checkpointer.restore(1, training.abstract(run.mesh, state))
    np.testing.assert_array_equal(np.asarray(restored.trainable["odd"]).view(np.uint32), odd.view(np.uint32))
