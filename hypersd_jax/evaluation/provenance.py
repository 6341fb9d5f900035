"""The provenance of a report: when, with what, by which command, and how long it took."""

from __future__ import annotations

import datetime
import importlib
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax


def made_line() -> str:
    """Date, time and versions."""
    now = datetime.datetime.now().astimezone()
    package = importlib.import_module("hypersd_jax")
    return (
        f"Made {now:%Y-%m-%d %H:%M %Z} with hypersd_jax {package.__version__}, jax {jax.__version__}, "
        f"Python {platform.python_version()}."
    )


def typed_command(arguments: Sequence[str] | None) -> str:
    """Return the command that started this process, quoted for a shell.

    Args:
        arguments: what `hypersd_jax.cli.main` was called with. None are the process's own; any others that are not
            those of ``train.py`` or ``sample.py`` come from Python, and are shown as ``hypersd``'s.
    """
    program = Path(sys.argv[0])
    by_script = bool(arguments) and program.name == f"{(arguments or [''])[0]}.py"
    if arguments is not None and not (by_script and list(arguments[1:]) == sys.argv[1:]):
        return shlex.join(["hypersd", *arguments])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", "hypersd_jax", *sys.argv[1:]])
    return shlex.join([*(["python"] if program.suffix == ".py" else []), *sys.argv])


def python_command(config_file: Path) -> str:
    """A run that a Python program started: the call that would repeat it."""
    return f"hypersd_jax.train(hypersd_jax.load_config({str(config_file)!r}))  # from Python"


def duration(seconds: float) -> str:
    """Seconds for a reader: ``12.3 s``, ``4 min 05 s``, ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def device_line() -> str:
    """The devices, and their kind."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"
