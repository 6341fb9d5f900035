"""``hypersd doctor``."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="what this machine offers, and whether it is ready",
        description="Print versions, devices, attention kernels (each tried once), caches, memory, disk and warnings: "
        "what a bug report should hold.",
        epilog="example:\n  hypersd doctor --json\n",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print what this machine offers."""
    from hypersd_jax.machine import inspect_machine, report_lines

    report = inspect_machine()
    print(json.dumps(report, indent=1, allow_nan=False) if options.json else "\n".join(report_lines(report)))
