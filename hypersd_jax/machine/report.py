"""Everything that a bug report should say of a machine, as one tree of plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypersd_jax.machine import accelerators, attention, limits, storage, versions
from hypersd_jax.machine.advice import warnings_of

FAILED = "failed"
"""Key of a section whose probe raised an exception: the exception in one line."""

PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "versions": versions.installed,
    "environment": versions.environment,  # before JAX is imported, which sets some itself
    "cpu": limits.processor,
    "memory": limits.memory,
    "devices": accelerators.devices,
    "mesh": accelerators.default_mesh,
    "attention": attention.kernels,
    "compiled programs": storage.compiled_programs,
    "models from the hub": storage.hub_cache,
    "disk": storage.free_disk,
    "hardware": accelerators.hardware,
}
"""What is looked at, by the name of its section; the libraries are imported inside."""


def inspect_machine() -> dict[str, Any]:
    """Ask every probe, and add what a user should know of the answers.

    Returns:
        The sections of `PROBES`, in place of one that failed ``{"failed": why}``, and "warnings", a list of sentences.
        All values are JSON's.
    """
    found: dict[str, Any] = {name: _asked(probe) for name, probe in PROBES.items()}
    return {**found, "warnings": [*warnings_of(found), *_failures(found)]}


def _asked(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return probe()
    except Exception as error:  # a library that is broken is what this report is for
        first = (str(error).strip().splitlines() or [""])[0]
        return {FAILED: f"{type(error).__name__}: {first}" if first else type(error).__name__}


def _failures(found: Mapping[str, Any]) -> list[str]:
    return [f"{name} could not be looked at: {part[FAILED]}" for name, part in found.items() if FAILED in part]
