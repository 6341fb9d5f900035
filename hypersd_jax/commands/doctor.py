"""``hypersd doctor``."""

from __future__ import annotations

import argparse
import os
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="what this machine offers",
        description="Print versions, devices and memory.",
        epilog="example:\n  hypersd doctor\n",
    )
    parser.set_defaults(run=run)


def run(_options: argparse.Namespace) -> None:
    """Print what this machine offers."""
    import platform

    import flax
    import jax

    devices: list[Any] = jax.devices()
    print(f"python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}")
    print(f"{jax.default_backend()}: {len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores")
    stats = devices[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        print(f"memory of a device: {stats['bytes_limit'] / 2**30:.1f} GiB")
