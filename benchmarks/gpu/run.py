"""Run the parts one after another, each in a process of its own that is ended when its time is over.

Needs Python's own library alone. Whatever happens to a part, the later ones run, and the tables are written again.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import environment_file, install
from benchmarks.gpu.parts import INTERPRETERS, PARTS, Part, chosen
from benchmarks.gpu.rows import Rows, drop_rows
from benchmarks.gpu.summary import STATUSES, summarise

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
CACHE = ROOT / "outputs" / "gpu-cache"
LOG = "log.txt"
INSTALL = "install"
SECONDS = 720.0
LACKING = 3
"""Exit status of a part that lacks what it needs, and has said what."""
DONE, LEFT_OUT, FAILED, OUT_OF_TIME, NO_TIME, STOPPED = STATUSES
LEAST_SECONDS = 1.0
"""A part with less time than this is not begun."""
AT_THE_END = 0.01
"""The share of the time that is kept for ending the last part and for the tables."""
GRACE = 3.0
"""Seconds between asking a part to end and ending it."""


class Stopped(BaseException):
    """The run itself was asked to end, by SIGTERM or SIGINT."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the variables of `benchmarks/gpu.sh` say.

    Attributes:
        out: folder of the results.
        seconds: of the whole run.
        tiny: tiny shapes on a CPU.
        parts: which are run, in their order.
        pythons: interpreters by the names of `INTERPRETERS`; those that are not there are made.
    """

    out: Path
    seconds: float
    tiny: bool
    parts: Sequence[Part]
    pythons: Mapping[str, str]

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> Settings:
        """Read the variables; ValueError says what is wrong with one."""
        return cls(
            out=Path(variables.get("OUT") or RESULTS).resolve(),
            seconds=float(variables.get("GPU_SECONDS") or SECONDS),
            tiny=bool(variables.get("GPU_TINY")),
            parts=chosen(variables.get("GPU_PARTS", "").split()),
            pythons={name: variables[name] for name in INTERPRETERS if variables.get(name)},
        )


def main() -> int:
    """Run what the variables ask for; 1 if a part failed."""
    try:
        settings = Settings.of(os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        return _run_all(settings)
    except Stopped:  # while no part was running
        return 1


def _run_all(settings: Settings) -> int:
    begin = time.monotonic()
    drop_rows(settings.out, [INSTALL, *(part.name for part in settings.parts)])
    for name in {environment_file.NAME, LOG} if len(settings.parts) == len(PARTS) else ():
        (settings.out / name).unlink(missing_ok=True)
    python = settings.pythons.get(INTERPRETERS[0])
    if python is None:
        made = install.make(settings.out / LOG, limit=settings.seconds / 2)
        Rows(folder=settings.out, part=INSTALL).add("part", **made.row)
        python = made.python
    pythons = {name: settings.pythons.get(name, python) for name in INTERPRETERS}

    def command(part: Part) -> list[str]:
        options = ["--out", str(settings.out), "--part", part.name, *["--tiny"] * settings.tiny]
        return [pythons[part.python], "-m", "benchmarks.gpu", *part.arguments, *options]

    left = settings.seconds - (time.monotonic() - begin)
    return run(settings.parts, command, settings.out, left, lambda part: variables_of(part, tiny=settings.tiny))


def _stop(number: int, _frame: Any) -> None:
    raise Stopped(number)


def variables_of(part: Part, *, tiny: bool) -> dict[str, str]:
    """Return the environment of a part: memory as it is needed, compiled programs kept in `CACHE`, no hub."""
    found = {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "torch"),
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    if tiny or part.python != INTERPRETERS[0]:
        found["JAX_PLATFORMS"] = "cpu"  # PyTorch's side reads configurations with it, and is to have the GPU alone
    return found


def run(
    parts: Sequence[Part],
    command: Callable[[Part], Sequence[str]],
    out: Path,
    seconds: float,
    variables: Callable[[Part], Mapping[str, str]],
) -> int:
    """Run parts within ``seconds``, and write the tables after each; 1 if one failed.

    Args:
        parts: in their order.
        command: what a part's process is.
        out: folder of the results.
        seconds: for all of them, by their shares.
        variables: the environment of a part.
    """
    begin, used, failed = time.monotonic(), 0.0, False
    whole = seconds * (1 - AT_THE_END) / sum(part.share for part in parts)
    for part in parts:
        used += part.share
        rows = Rows(folder=out, part=part.name)
        limit = begin + used * whole - time.monotonic()
        if limit < LEAST_SECONDS:
            rows.add("part", status=NO_TIME, seconds=0.0, reason="the parts before it took all of the time")
            continue
        start = time.monotonic()
        try:
            status, reason = run_part(command(part), out / LOG, limit, variables(part))
        except Stopped:
            rows.add("part", status=STOPPED, seconds=time.monotonic() - start, reason="the whole run was ended here")
            _write_tables(out)
            return 1
        rows.add("part", status=status, seconds=time.monotonic() - start, reason=reason)
        failed = failed or status == FAILED
        _write_tables(out)
    _write_tables(out)
    return int(failed)


def run_part(command: Sequence[str], log: Path, limit: float, variables: Mapping[str, str]) -> tuple[str, str]:
    """Run a part for at most ``limit`` seconds; return its status, and why it is not done."""
    with log.open("ab") as file:
        before = file.tell()
        file.write(f"\n== {' '.join(command)}, at most {limit:.0f} s\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=ROOT, env=dict(variables), start_new_session=True
            )
        except OSError as error:
            return FAILED, str(error)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return OUT_OF_TIME, f"cut off after {limit:.0f} s"
        finally:
            _end(process)
    if code == 0:
        return DONE, ""
    return (LEFT_OUT if code == LACKING else FAILED), _last_line(log, before) or f"exit status {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


def _last_line(log: Path, begin: int) -> str:
    """The last line that a part has written, which is what an exception says."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()[2:]
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _write_tables(out: Path) -> None:
    """A mistake in a table must not cost the measurements that are to come."""
    try:
        summarise(out)
    except Exception:
        with (out / LOG).open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
