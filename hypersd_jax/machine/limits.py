"""Cores and memory that this process may use: the machine's, or fewer where a control group limits it (containers)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

ROOT = Path("/")
UNLIMITED = 2**60
"""Version 1 of control groups writes about this many bytes where there is no limit."""


def processor(root: Path = ROOT) -> dict[str, Any]:
    """Count the machine's cores, and those that this process may use by affinity and by quota (a fraction, or None)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cores": os.cpu_count(), "allowed": allowed, "quota": _quota(root), "model": _model(root)}


def memory(root: Path = ROOT) -> dict[str, Any]:
    """Read the machine's memory, what is available of it, and the control group's limit or None, in bytes."""
    lines = (_read(root / "proc/meminfo") or "").splitlines()
    fields = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines) if value}
    return {"total": fields.get("MemTotal"), "available": fields.get("MemAvailable"), "limit": _limit(root)}


def _quota(root: Path) -> float | None:
    for folder in _groups(root):
        quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            return int(quota) / int(period)
    old = root / "sys/fs/cgroup/cpu"
    quota, period = _read(old / "cpu.cfs_quota_us") or "", _read(old / "cpu.cfs_period_us") or ""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _limit(root: Path) -> int | None:
    for folder in _groups(root):
        if (found := _read(folder / "memory.max") or "").isdigit():
            return int(found)
    found = _read(root / "sys/fs/cgroup/memory/memory.limit_in_bytes") or ""
    return int(found) if found.isdigit() and int(found) < UNLIMITED else None


def _groups(root: Path) -> list[Path]:
    """List the folders of this process's control group (version 2) and of those around it, the innermost first."""
    base = root / "sys/fs/cgroup"
    lines = (_read(root / "proc/self/cgroup") or "").splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    inner = base / own
    return [inner, *(parent for parent in inner.parents if parent.is_relative_to(base))]


def _model(root: Path) -> str | None:
    lines = (_read(root / "proc/cpuinfo") or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
