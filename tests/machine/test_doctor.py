"""`hypersd doctor`: what it says of this machine, and of others that a folder stands for."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from hypersd_jax.cli import main
from hypersd_jax.machine import accelerators, attention, limits, report, storage, versions
from hypersd_jax.machine.advice import warnings_of


def doctor(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    main(["doctor", *options])
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_the_report_of_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNX_GRAPH_MODE", "false")
    found = json.loads(doctor(capsys, "--json"))
    assert list(found) == [*report.PROBES, "warnings"]
    assert not [name for name in report.PROBES if "failed" in found[name]]
    assert found["versions"]["jax"] == jax.__version__
    assert found["environment"]["NNX_GRAPH_MODE"] == "false"
    assert found["devices"] == {
        "platform": "cpu",
        "kind": "cpu",
        "count": 1,
        "local": 1,
        "processes": 1,
        "memory": [None],
    }
    assert found["mesh"] == {"data": 1, "fsdp": 1}
    assert found["cpu"]["cores"] == os.cpu_count()
    assert 0 < found["memory"]["available"] < found["memory"]["total"]
    assert found["disk"]["here"]["free"] > 0
    assert found["compiled programs"]["folder"] == os.environ["JAX_COMPILATION_CACHE_DIR"]


def test_each_chosen_kernel_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(doctor(capsys, "--json"))["attention"]
    assert found["dtype"] == "float32"
    assert found["chosen"] == dict.fromkeys(attention.SHAPES, "blocks")
    assert set(found["tried"]) == {f"blocks, width {width}" for width in (40, 80, 64, 512)}
    assert all(0 <= each["difference"] < 1e-5 for each in found["tried"].values())


def test_the_same_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    lines = doctor(capsys).splitlines()
    assert {"versions", "devices", "attention", "disk"} <= set(lines)
    assert f"  jax               {jax.__version__}" in lines
    assert "    SD 1.5, 512 px, outer blocks  blocks" in lines
    assert lines[-1] == "no warnings" or lines[-1].startswith("warning: ")


def test_a_kernel_whose_library_refuses_it() -> None:
    """The TPU's kernel on a CPU, where JAX has no compiler for it."""
    assert list(attention.try_kernel("pallas", 64, dtype="bfloat16")) == ["refused"]


def test_a_probe_that_fails_is_named_and_the_others_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("Unable to initialize backend 'tpu': the chip is in use\nand much more")

    monkeypatch.setitem(report.PROBES, "devices", broken)
    found = json.loads(doctor(capsys, "--json"))
    why = "RuntimeError: Unable to initialize backend 'tpu': the chip is in use"
    assert found["devices"] == {"failed": why}
    assert found["warnings"][-1] == f"devices could not be looked at: {why}"
    assert found["mesh"] == {"data": 1, "fsdp": 1}


def touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_devices_that_jax_does_not_use(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "vfio/0", "vfio/vfio"):
        touch(tmp_path / "dev" / name)
    hardware = accelerators.hardware(tmp_path)
    assert hardware == {"gpus": [f"{tmp_path}/dev/nvidia0"], "tpus": [f"{tmp_path}/dev/vfio/0"]}
    found = {"hardware": hardware, "devices": {"platform": "cpu"}, "versions": {"jax": "1"}, "environment": {}}
    gpu, tpu = warnings_of(found)
    assert gpu == f"there is a GPU ({tmp_path}/dev/nvidia0), but JAX computes on the CPU; install with '.[cuda]'"
    assert tpu == f"there may be a TPU ({tmp_path}/dev/vfio/0), but JAX sees none; install with '.[tpu]'"
    plugins = {**found, "versions": {"jax-cuda13-plugin": "1", "libtpu": "1"}}
    assert [line.rpartition("; ")[2] for line in warnings_of(plugins)] == [
        "the driver may be too old for it",
        "another process may hold it",
    ]
    forced = {**found, "environment": {"JAX_PLATFORMS": "cpu"}}
    assert {line.rpartition("; ")[2] for line in warnings_of(forced)} == {"JAX_PLATFORMS=cpu is set"}
    assert warnings_of({**found, "devices": {"platform": "gpu"}}) == []


def test_limits_of_a_control_group(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    touch(tmp_path / "proc/meminfo", "MemTotal:  64000000 kB\nMemAvailable:  32000000 kB\n")
    touch(tmp_path / "proc/self/cgroup", "0::/pod/inner\n")
    touch(group / "pod/memory.max", "8000000000\n")
    touch(group / "pod/inner/memory.max", "max\n")
    touch(group / "pod/cpu.max", "150000 100000\n")
    assert limits.memory(tmp_path) == {"total": 65_536_000_000, "available": 32_768_000_000, "limit": 8_000_000_000}
    assert limits.processor(tmp_path)["quota"] == 1.5


def test_limits_of_an_old_control_group(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    touch(group / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    touch(group / "cpu/cpu.cfs_quota_us", "-1\n")
    touch(group / "cpu/cpu.cfs_period_us", "100000\n")
    assert limits.memory(tmp_path) == {"total": None, "available": None, "limit": None}
    assert limits.processor(tmp_path)["quota"] is None
    touch(group / "memory/memory.limit_in_bytes", "4000000000\n")
    touch(group / "cpu/cpu.cfs_quota_us", "50000\n")
    assert limits.memory(tmp_path)["limit"] == 4_000_000_000
    assert limits.processor(tmp_path)["quota"] == 0.5


def test_versions_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"hypersd_jax": "0.1.0", "jax": "0.4.35", "flax": "99.0"}
    monkeypatch.setattr(versions, "version_of", there.get)
    (line,) = warnings_of({})
    assert line.startswith("jax 0.4.35 is older than 0.")


def test_a_copy_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version_of", lambda _: None)
    assert versions.too_old() == []
    assert versions.installed()["hypersd_jax"] is None


def test_a_full_disk_and_folders_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_200_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "file")
    found = {"disk": storage.free_disk(), "compiled programs": storage.folder(tmp_path / "file" / "jax")}
    lines = warnings_of(found)
    assert f"{tmp_path}: 3.2 GB are free, and a run may need more" in lines
    assert lines[-1] == f"compiled programs cannot be kept: {tmp_path}/file/jax cannot be written"


def test_the_size_of_a_folder(tmp_path: Path) -> None:
    touch(tmp_path / "cache/a", "x" * 1000)
    touch(tmp_path / "cache/b/c", "x" * 500)
    (tmp_path / "cache/link").symlink_to(tmp_path / "cache/a")
    found = storage.folder(tmp_path / "cache")
    assert (found["bytes"], found["complete"], found["writable"], found["exists"]) == (1500, True, True, True)
    assert storage.folder(tmp_path / "none")["exists"] is False
    assert storage.folder(None)["writable"] is False
