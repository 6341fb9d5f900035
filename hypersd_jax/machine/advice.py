"""What a user should know of a report: sentences, each with its remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypersd_jax.machine.versions import too_old

LEAST_FREE = 5 * 10**9
"""Bytes of disk below which a run may not find room for checkpoints."""

MOST_DIFFERENCE = 0.02
"""Of a kernel's result from XLA's, on outputs of about 0.05: more than bfloat16's rounding can make."""


def warnings_of(found: Mapping[str, Any]) -> list[str]:
    """List the warnings of a report's sections, of which some may have failed."""
    return [*_accelerators(found), *_versions(), *_disk(found), *_kernels(found)]


def _accelerators(found: Mapping[str, Any]) -> list[str]:
    hardware, devices = found.get("hardware", {}), found.get("devices", {})
    platform = devices.get("platform")
    lines = []
    forced = found.get("environment", {}).get("JAX_PLATFORMS")
    why = f"; JAX_PLATFORMS={forced} is set" if forced else ""
    if hardware.get("gpus") and platform == "cpu":
        plugins = [name for name in found.get("versions", {}) if "cuda" in name]
        remedy = "the driver may be too old for it" if plugins else "install with '.[cuda]'"
        lines.append(f"there is a GPU ({hardware['gpus'][0]}), but JAX computes on the CPU{why or f'; {remedy}'}")
    if hardware.get("tpus") and platform == "cpu":
        has_library = "libtpu" in found.get("versions", {})
        remedy = "another process may hold it" if has_library else "install with '.[tpu]'"
        lines.append(f"there may be a TPU ({hardware['tpus'][0]}), but JAX sees none{why or f'; {remedy}'}")
    return lines


def _versions() -> list[str]:
    return [f"{name} {there} is older than {oldest}, the oldest supported" for name, there, oldest in too_old()]


def _disk(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for place in found.get("disk", {}).values():
        if isinstance(place, Mapping) and place["free"] < LEAST_FREE:
            lines.append(f"{place['folder']}: {place['free'] / 1e9:.1f} GB are free, and a run may need more")
    for name in ("compiled programs", "models from the hub"):
        if found.get(name, {}).get("writable") is False:
            folder = found[name]["folder"] or "no folder"
            lines.append(f"{name} cannot be kept: {folder} cannot be written")
    return lines


def _kernels(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for label, result in found.get("attention", {}).get("tried", {}).items():
        if "refused" in result:
            lines.append(f"attention kernel {label}: refused here, so XLA's slower one runs ({result['refused']})")
        elif not result["difference"] <= MOST_DIFFERENCE:  # not a number, too
            lines.append(f"attention kernel {label}: differs from XLA's by {result['difference']:.2g}")
    return lines
