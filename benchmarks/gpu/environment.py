"""What the measurements were taken on: card, driver, memory, and the versions of what computes."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import distributions
from typing import Any

from benchmarks.gpu import environment_file
from benchmarks.gpu.rows import Rows

PACKAGES = re.compile(r"^(jax|jaxlib|flax|optax|numpy|torch|triton|diffusers|transformers|jax[-_]cuda.*|nvidia[-_].*)$")
QUERY = ("name", "memory.total", "driver_version", "clocks.max.sm", "power.limit")


def describe(rows: Rows, *, tiny: bool) -> None:
    """Write `environment.json`: first what needs no GPU, then the device as JAX sees it."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "nvidia-smi": _output("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv"),
        "versions": dict(
            sorted({each.name: each.version for each in distributions() if PACKAGES.match(each.name or "")}.items())
        ),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("XLA_", "JAX_"))},
    }
    environment_file.write(rows.folder, found)

    from benchmarks.gpu import models  # which asks for the GPU

    device = models.start(tiny=tiny)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    found["device"] = {"name": device.device_kind, "platform": device.platform, "bytes": limit}
    found["device"]["compute capability"] = getattr(device, "compute_capability", None)
    environment_file.write(rows.folder, found)
    rows.add("environment", device=device.device_kind, platform=device.platform)


def _output(*command: str) -> str | None:
    """What a command prints; None where there is no such command, or it fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
