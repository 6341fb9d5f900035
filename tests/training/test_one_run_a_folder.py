"""A folder belongs to one run at a time: who holds it is named, and who has died holds nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hypersd_jax.config import load_config
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.caching import write_cache
from hypersd_jax.stages import train
from hypersd_jax.training.lock import FolderLock
from tests.helpers.short_runs import recipe

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from hypersd_jax.training.lock import FolderLock
with FolderLock(sys.argv[1], "output_dir"):
    print("held", flush=True)
    time.sleep(600)
"""


def another(folder: Path) -> subprocess.Popen:
    """A process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def forge(folder: Path, **changes: object) -> Path:
    """A lock as another process, or another machine, would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    found = {"pid": os.getpid(), "host": socket.gethostname(), "started": 1, "since": "2031-02-03T04:05:06+00:00"}
    path.write_text(json.dumps({**found, **changes}))
    return path


def test_a_second_run_is_refused_at_once_and_a_dead_one_is_not_in_the_way(tmp_path):
    out = tmp_path / "new" / "out"
    process = another(out)
    try:
        config = recipe(tmp_path, Path("/nowhere"), f"output_dir={out}")
        words = rf"^output_dir: {out} is in use by process {process.pid} on {socket.gethostname()}, since 20.*; wait"
        begin = time.monotonic()
        with pytest.raises(UserError, match=words):
            train(config)
        assert time.monotonic() - begin < 2
        with pytest.raises(UserError, match=words.replace("output_dir", "--output")):
            write_cache(config, out)
    finally:
        process.kill()
        process.wait()
    assert (out / ".lock").is_file()
    with FolderLock(out, "output_dir"):
        assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()
    assert list(out.iterdir()) == []


def test_it_is_the_first_thing_and_leaves_nothing(tmp_path):
    """A run that is refused makes no folders, and one that is under way in the same process counts as well."""
    config = recipe(tmp_path, Path("/nowhere"), f"output_dir={tmp_path / 'a' / 'b'}")
    with pytest.raises(UserError, match="/nowhere"):
        train(config)
    assert not (tmp_path / "a").exists()
    with FolderLock(tmp_path / "a", "x"), pytest.raises(UserError, match=f"x: .* process {os.getpid()} on"):
        FolderLock(tmp_path / "a", "x").__enter__()
    assert not (tmp_path / "a").exists()


def test_the_lock_of_another_machine_is_respected(tmp_path):
    path = forge(tmp_path, host="elsewhere", pid=7)
    with pytest.raises(UserError, match=rf"process 7 on elsewhere, since 2031.*has ended, delete {path}$"):
        FolderLock(tmp_path, "output_dir").__enter__()
    assert path.is_file()


@pytest.mark.parametrize("changes", [{"started": 1}, {"pid": 2**22 + 5}, {"pid": 2**70}, {"pid": -1}])
def test_a_number_given_to_another_process_since_is_stale(tmp_path, changes):
    forge(tmp_path, **changes)
    with FolderLock(tmp_path, "output_dir"):
        assert json.loads((tmp_path / ".lock").read_text())["since"] != "2031-02-03T04:05:06+00:00"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "null"])
def test_what_is_no_lock_is_named(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(UserError, match=r"output_dir: .*\.lock is not a lock that can be read.*delete the file"):
        FolderLock(tmp_path, "output_dir").__enter__()


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"output_dir: .*out cannot be written \(File exists\)"):
        train(load_config(_recipe(tmp_path), []))


def _recipe(folder: Path) -> Path:
    recipe(folder, Path("/nowhere"))
    return folder / "recipe.yaml"
