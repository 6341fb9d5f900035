"""The benchmark on a GPU keeps what it has measured: parts that fail or take too long, and tables of any rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.gpu import install, parts, run
from benchmarks.gpu.parts import Part
from benchmarks.gpu.rows import FILE, Rows, drop_rows, read_rows, reason_of
from benchmarks.gpu.summary import STATUSES

ROOT = Path(__file__).parents[2]
# A row, and then what the name says.
FAKE = {
    "good": "",
    "raises": "raise ValueError('no such kernel')",
    "lacks": "print('torch is not here'); raise SystemExit(3)",
    "slow": "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', CHILD]); time.sleep(60)",
    "last": "",
}
PASSED = {"test": "x", "outcome": "passed", "seconds": 1.0, "reason": ""}
CHILD = """import time
while True:
    open({!r}, "a").write("alive")
    time.sleep(0.05)
"""


def fake(names: Sequence[str], out: Path, seconds: float, shares: dict[str, float] | None = None) -> int:
    """Run parts that take a moment, or as long as they may."""

    def command(part: Part) -> list[str]:
        child = CHILD.format(str(out / "child"))
        add = f"Rows(folder=Path({str(out)!r}), part={part.name!r}).add('test', **{PASSED})"
        code = f"from pathlib import Path; from benchmarks.gpu.rows import Rows; {add}; CHILD = {child!r}"
        return [sys.executable, "-c", f"{code}\n{FAKE[part.name]}"]

    some = [Part(name=name, arguments=[], share=(shares or {}).get(name, 1.0)) for name in names]
    out.mkdir(exist_ok=True)
    return run.run(some, command, out, seconds, lambda part: run.variables_of(part, tiny=True))


def test_parts_that_fail_or_take_too_long_do_not_stop_the_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin = time.monotonic()
    assert fake(list(FAKE), out, 9, dict.fromkeys(["raises", "lacks", "slow"], 0.0)) == 1
    assert time.monotonic() - begin < 15
    rows = read_rows(out)
    found = {row["part"]: row for row in rows if row["kind"] == "part"}
    assert [row["status"] for row in found.values()] == ["done", "failed", "left out", "out of time", "done"]
    assert found["raises"]["reason"] == "ValueError: no such kernel"
    assert found["lacks"]["reason"] == "torch is not here"
    assert {row["part"] for row in rows if row["kind"] == "test"} == {*FAKE}  # what they wrote before they ended stays
    page = (out / "README.md").read_text()
    assert "2 done, 1 left out, 1 failed, 1 out of time." in page
    assert "| raises | failed |" in page
    assert json.loads((out / "results.json").read_text())["rows"] == rows
    assert "no such kernel" in (out / run.LOG).read_text()
    size = (out / "child").stat().st_size
    time.sleep(0.5)
    assert (out / "child").stat().st_size == size  # what a part had started has ended with it


def test_a_part_without_time_is_not_begun(tmp_path: Path) -> None:
    assert fake(["good", "last"], tmp_path, 0.5) == 0
    assert [row["status"] for row in read_rows(tmp_path)] == ["no time left"] * 2


def test_what_a_part_leaves_the_later_ones_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = []
    monkeypatch.setattr(run, "run_part", lambda command, log, limit, variables: (limits.append(limit), ("done", ""))[1])
    fake(["good", "raises", "last"], tmp_path, 100, {"raises": 0.0, "last": 3.0})
    assert limits == pytest.approx([24.75, 24.75, 99], abs=1)


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    part = Part(name="x", arguments=[], share=1)
    assert run.run([part], lambda _: [str(tmp_path / "python")], tmp_path, 10, lambda _: dict(os.environ)) == 1
    (row,) = read_rows(tmp_path)
    assert row["status"] == "failed"
    assert "No such file" in row["reason"]


def test_a_run_that_is_ended_writes_its_tables(tmp_path: Path) -> None:
    """As a machine does that takes itself back."""
    variables = {"OUT": str(tmp_path), "GPU_TINY": "1", "GPU_PARTS": "sd15 attention", "PYTHON": sys.executable}
    process = subprocess.Popen(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env={**os.environ, **variables})
    limit, log = time.monotonic() + 60, tmp_path / run.LOG
    while not (log.exists() and "== " in log.read_text()):
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    assert "| sd15 | stopped |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"GPU_PARTS": "sd15 sd16"}, "no part is called sd16"), ({"GPU_SECONDS": "long"}, "could not convert")],
)
def test_variables_that_say_nothing(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.Settings.of(variables)


def test_some_parts_again_keep_the_others_rows(tmp_path: Path) -> None:
    for name in ("sd15", "sdxl"):
        Rows(folder=tmp_path, part=name).add("sampling", median=1.0)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"part": "sdxl", "ki')  # the machine went off
    drop_rows(tmp_path, ["sd15"])
    assert read_rows(tmp_path) == [{"part": "sdxl", "kind": "sampling", "median": 1.0}]


@pytest.mark.parametrize(("error", "reason"), [(ValueError(), "ValueError: "), (OSError("a\nb"), "OSError: a")])
def test_errors_that_say_little_or_much(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_without_pytorchs_packages_the_rest_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []

    def stub(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, int(command[-1].endswith("[cuda,test]")))

    monkeypatch.setattr(install.subprocess, "run", stub)
    made = install.make(tmp_path / run.LOG, limit=60)
    assert made.row["status"] == "done"
    assert made.row["reason"].startswith("without PyTorch's side: ")
    assert [command[-1].rpartition("[")[2] for command in commands if "pip" in command] == [
        "cuda,test]",
        "cuda,test-core]",
    ]
    assert made.python == str(install.FOLDER / "bin" / "python")
    assert install.make(tmp_path / run.LOG, limit=0).row["status"] == "out of time"


def test_the_parts_fill_the_time() -> None:
    names = [part.name for part in parts.PARTS]
    assert len({*names}) == len(names)
    assert sum(part.share for part in parts.PARTS) <= run.SECONDS
    assert sum(part.arguments[0] == "train" for part in parts.PARTS) == 2 * 2 * 2 + 1
    assert [part.name for part in parts.chosen(["sdxl", "tests"])] == ["tests", "sdxl"]
    assert all(part.share for part in parts.chosen([part.name for part in parts.PARTS if not part.share]))
    assert STATUSES[0] == run.DONE


def test_a_table_that_cannot_be_made_hides_no_other(tmp_path: Path) -> None:
    Rows(folder=tmp_path, part="x").add("training", family="sd15")  # of which all else is missing
    assert fake(["good"], tmp_path, 10) == 0
    page = (tmp_path / "README.md").read_text()
    assert "could not be made (KeyError: " in page
    assert "| good | done |" in page


def test_without_any_table_the_parts_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "summarise", lambda out: 1 / 0)
    assert fake(["good", "last"], tmp_path, 20) == 0
    assert [row["status"] for row in read_rows(tmp_path) if row["kind"] == "part"] == ["done", "done"]
    assert "ZeroDivisionError" in (tmp_path / run.LOG).read_text()


def test_the_runner_needs_pythons_own_library_alone() -> None:
    code = "import sys, benchmarks.gpu.__main__; print(sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "jax" not in done.stdout
    assert "numpy" not in done.stdout


def test_an_unknown_interpreter_of_pytorch_is_left_out(tmp_path: Path) -> None:
    """An environment without packages: its columns are empty, and the page says why."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    variables = {"OUT": str(tmp_path), "GPU_TINY": "1", "GPU_PARTS": "sd15-torch", "TORCH_PYTHON": str(bare)}
    variables["PYTHON"] = sys.executable
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env={**os.environ, **variables}, timeout=60)
    assert done.returncode == 0
    (row,) = read_rows(tmp_path)
    assert row["status"] == "left out"
    assert "has no torch, diffusers" in row["reason"]
