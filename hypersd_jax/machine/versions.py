"""Versions of the packages that decide what a program does, and the variables that steer them."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from typing import Any

OWN = "hypersd_jax"
PACKAGES = (OWN, "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
PLUGINS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-cuda13-pjrt", "jax-cuda12-pjrt", "jax-rocm7-plugin")
"""Packages that bring an accelerator, listed only where they are installed."""

PREFIXES = ("JAX_", "XLA_", "NNX_", "LIBTPU_", "TPU_", "CUDA_VISIBLE_DEVICES")


def installed() -> dict[str, Any]:
    """Read the versions of Python, the system, the packages (None: not installed) and the accelerators' plugins."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    found |= {name: version_of(name) for name in PACKAGES}
    return found | {name: version for name in PLUGINS if (version := version_of(name)) is not None}


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """List the variables that are set and steer JAX, XLA or NNX."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}


def too_old() -> list[tuple[str, str, str]]:
    """List what is older than this package needs: (package, version there, oldest that is supported)."""
    found = []
    for requirement in (version_of(OWN) and metadata.requires(OWN)) or []:  # a copy that is not installed tells nothing
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)  # the others belong to an extra
        there = version_of(match[1]) if match else None
        if match and there is not None and _numbers(there) < _numbers(match[2]):
            found.append((match[1], there, match[2]))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """Read the numbers a version begins with: (0, 10, 2) of 0.10.2.dev3."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
