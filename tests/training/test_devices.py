"""Eight fake devices, in a process of their own, because the count is fixed when the backend starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPLIT = {  # leaf -> its piece under fsdp=4; width 8,208 in all
    f"{tree}/first/kernel": [8, 2_052]
    for tree in ("trainable/student", "ema/student", "opt_state/student/1/mu", "opt_state/student/1/nu")
}

pytestmark = pytest.mark.devices


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.scripts.meshes", str(tmp_path_factory.mktemp("checkpoints"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["devices"] == 8
    return result


@pytest.mark.parametrize("shape", ["8x1", "2x4", "1x8"])
def test_every_mesh_trains_the_same_parameters(seen, shape):
    assert seen[shape]["difference"] < 1e-6
    assert seen[shape]["loss"] == pytest.approx(seen["1x1"]["loss"], rel=1e-5)
    assert seen[shape]["grad_norm"] == pytest.approx(seen["1x1"]["grad_norm"], rel=1e-4)


def test_large_leaves_are_split_and_stay_so(seen):
    assert seen["2x4"]["split_before"] == seen["2x4"]["split_after"] == SPLIT
    for leaf, piece in seen["1x8"]["split_after"].items():
        assert piece == [8, SPLIT[leaf][1] // 2]
    assert seen["1x8"]["split_after"].keys() == SPLIT.keys()
    assert seen["1x1"]["split_after"] == seen["8x1"]["split_after"] == {}


@pytest.mark.parametrize("shape", ["1x1", "8x1", "2x4", "1x8"])
def test_every_step_after_the_first_takes_its_program(seen, shape):
    """The next state lies as the one before."""
    assert seen[shape]["compiled_later"] == 0


def test_weights_have_one_name_on_every_mesh(seen):
    assert len(seen["fingerprints"]) == 5
    assert len(set(seen["fingerprints"])) == 1


@pytest.mark.parametrize("shape", ["1x1", "8x1", "2x4", "1x8"])
def test_the_state_is_donated_and_the_base_is_not(seen, shape):
    assert seen[shape]["donated"]
    assert seen[shape]["frozen_kept"]


def test_a_checkpoint_restores_under_another_mesh(seen):
    assert seen["restored"]


def test_losses_may_name_the_batch_axes(seen):
    assert seen["constrained"]


def test_the_rule(seen):
    assert seen["rules"] == {
        "small": "P(None, None)",
        "half_as_wide": "P(None,)",
        "tall": "P('fsdp', None)",
        "kernel": "P(None, None, None, 'fsdp')",
        "square": "P('fsdp', None)",
        "second_choice": "P(None, 'fsdp')",
        "none_fits": "P(None, None)",
    }


def test_remaining_devices_go_to_data(seen):
    assert seen["default"] == {"data": 4, "fsdp": 2}


def test_auto_takes_what_is_there(seen):
    """The greatest common divisor of 8 and 1, 2, 3, 4, 6, 8 devices; beside an explicit `data`, of what that leaves."""
    assert seen["auto"] == [[1, 1], [1, 2], [3, 1], [1, 4], [3, 2], [1, 8]]
    assert seen["auto of the rest"] == {"data": 4, "fsdp": 2}


def test_batches_are_dealt_out_evenly_or_refused(seen):
    assert seen["batch_piece"] == [2, 2, 4]
    assert "batch_size: 12 samples" in seen["uneven"]
