"""``hypersd train --dry-run``: its options, and the plan that it prints in place of training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable

from hypersd_jax.commands.parsing import Names, whole
from hypersd_jax.config import Config
from hypersd_jax.errors import UserError

OPTIONS = {"json": False, "device": None, "devices": None, "timed_updates": None, "topology": None}
"""Options that say how to plan, with their defaults."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a plan."""
    group = parser.add_argument_group("plan first")
    group.add_argument("--dry-run", action="store_true", help="print what the run would take; train and write nothing")
    group.add_argument("--json", action="store_true", help="the plan as one JSON object")
    group.add_argument("--device", choices=Names(_devices), metavar="NAME", help="plan for: %(choices)s")
    group.add_argument("--devices", type=whole(1), metavar="N", help="plan for so many devices (default: those here)")
    group.add_argument("--timed-updates", type=whole(1), metavar="N", help="measure N updates of each stage here, too")
    group.add_argument(
        "--topology", metavar="NAME", help="compile for TPUs that are not here, such as v5e:2x4 (needs libtpu)"
    )


def require_dry_run(options: argparse.Namespace) -> None:
    """Refuse (UserError) options of a plan without ``--dry-run``, which would do nothing."""
    for name, default in OPTIONS.items():
        if getattr(options, name) != default:
            raise UserError(f"--{name.replace('_', '-')} is an option of --dry-run")


def print_plan(options: argparse.Namespace, config: Config) -> None:
    """Print the plan of a run."""
    device, devices = options.device, options.devices
    if options.topology is not None:
        kind = options.topology.partition(":")[0]
        if device is not None or devices is not None:
            raise UserError("--topology says which devices; --device and --devices do not go with it")
        from hypersd_jax.planning.topology import topology_devices

        devices = len(topology_devices(options.topology))
        device = kind if kind in _devices() else None
    from hypersd_jax.planning.output import plan_json, plan_lines
    from hypersd_jax.planning.plan import plan_run
    from hypersd_jax.planning.timing import time_updates
    from hypersd_jax.planning.topology import compile_steps

    plan = plan_run(config, device=device, devices=devices)
    compiled = compile_steps(config, options.topology) if options.topology else None
    timed = time_updates(config, options.timed_updates) if options.timed_updates else None
    if options.json:
        json.dump(plan_json(plan, timed, compiled), sys.stdout, indent=1)
        print()
    else:
        print("\n".join(plan_lines(plan, timed, compiled)))


def _devices() -> Iterable[str]:
    from hypersd_jax.planning.peaks import NAMES

    return NAMES
