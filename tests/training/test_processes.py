"""When a process looks for others, where, and what it says when it finds none; two real ones are in tests/stages."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from hypersd_jax.config import DistributedConfig, load_config
from hypersd_jax.errors import UserError
from hypersd_jax.training import processes

ROOT = Path(__file__).parents[2]
SIGNS = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "TPU_WORKER_HOSTNAMES",
    "SLURM_STEP_TASKS_PER_NODE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)


@pytest.fixture
def calls(monkeypatch):
    """What `jax.distributed.initialize` was asked for, in an environment that tells of no other process."""
    found = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **asked: found.append(asked))
    monkeypatch.setattr(processes, "_wait_for", lambda address, seconds: None)
    for name in SIGNS:
        monkeypatch.delenv(name, raising=False)
    return found


def test_without_a_sign_of_others_a_process_is_alone(calls):
    processes.join(DistributedConfig())
    assert calls == []


def test_an_address_is_used_as_it_is(calls):
    processes.join(DistributedConfig(coordinator="host:1234", processes=3, process=2, timeout_seconds=7))
    (asked,) = calls
    assert (asked["coordinator_address"], asked["num_processes"], asked["process_id"]) == ("host:1234", 3, 2)
    assert asked["initialization_timeout"] == asked["heartbeat_timeout_seconds"] == 7


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_launchers_tell_of_others(calls, monkeypatch, variables, several):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.join(DistributedConfig())
    assert bool(calls) == several
    processes.join(DistributedConfig(coordinator="alone"))
    assert len(calls) == several


def test_auto_asks_the_cluster_in_any_case(calls):
    processes.join(DistributedConfig(coordinator="auto"))
    assert calls[0]["coordinator_address"] is None


def test_who_has_met_the_others_does_not_again(calls, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    processes.join(DistributedConfig(coordinator="auto"))
    assert calls == []


def test_a_cluster_that_does_not_answer_is_named(calls, monkeypatch):
    def fail(**asked):
        raise ValueError("coordinator_address should be defined.\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"distributed.coordinator=auto: this process .*\(coordinator_address should"):
        processes.join(DistributedConfig(coordinator="auto"))


def test_tpu_chips_without_a_cluster_are_a_warning(calls, monkeypatch):
    def fail(**asked):
        raise RuntimeError("no metadata")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(processes, "_sign_of_several", lambda: processes.TPU_CHIPS)
    with pytest.warns(UserWarning, match=r"this process trains alone: no other host was found \(no metadata\)"):
        processes.join(DistributedConfig())


@pytest.mark.parametrize(
    ("variables", "whole_host"),
    [
        ({"SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, True),
        ({"SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, False),
        ({"SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "2,1"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
        ({}, False),
    ],
)
def test_a_process_alone_on_its_host_takes_all_of_its_gpus(calls, monkeypatch, variables, whole_host):
    """JAX takes one of them for each process that these launchers have started."""
    changed = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: changed.update({name: value}))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_CUDA_VISIBLE_DEVICES", "0,1")  # what the user leaves to it
    monkeypatch.delenv("JAX_ROCM_VISIBLE_DEVICES", raising=False)
    processes.join(DistributedConfig(coordinator="auto"))
    visible = {"jax_cuda_visible_devices": "0,1", "jax_rocm_visible_devices": "all"}
    assert changed == (visible if whole_host else {})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["distributed.coordinator=host"], "HOST:PORT, auto or alone"),
        (["distributed.coordinator=host:99999"], "HOST:PORT, auto or alone"),
        (["distributed.coordinator=host:1"], "needs processes and process"),
        (["distributed.process=1"], "go with coordinator=HOST:PORT"),
        (["distributed.coordinator=h:1", "distributed.processes=2", "distributed.process=2"], "from 0 to 1, not 2"),
        (["distributed.coordinator=h:1", "distributed.processes=0", "distributed.process=0"], "at least 1"),
        (["distributed.timeout_seconds=0"], "timeout_seconds must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together_are_named(overrides, said):
    with pytest.raises(UserError, match=said):
        load_config(Path("configs/emoji.yaml"), overrides)


@pytest.mark.devices
@pytest.mark.parametrize("layout", [(2, 2), (1, 4)], ids=str)
def test_no_group_of_devices_meets_for_the_first_time_later(layout):
    """There a process would wait 30 s at most for one that compiles for minutes. Gloo prints a line at each meeting."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.training.scripts.connect"]
    numbers = [str(port), *map(str, layout)]
    settings: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    settings["env"] = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    running = [subprocess.Popen([*command, str(number), *numbers], **settings) for number in (0, 1)]
    printed = [each.communicate(timeout=120)[0] for each in running]
    assert [each.returncode for each in running] == [0, 0], printed
    for text in printed:
        before, after = text.split("connected\n")
        assert "[Gloo]" in before
        assert "[Gloo]" not in after
        assert "weight" in after
