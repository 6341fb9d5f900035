"""Devices that JAX sees, the mesh they would make, and the accelerators that the system has beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path("/")


def devices() -> dict[str, Any]:
    """Describe the devices: platform, kind, counts over all processes and here, and each one's memory in bytes."""
    import jax

    found: list[Any] = jax.local_devices()
    return {
        "platform": jax.default_backend(),
        "kind": found[0].device_kind,
        "count": jax.device_count(),
        "local": len(found),
        "processes": jax.process_count(),
        "memory": [_memory(device) for device in found],
    }


def _memory(device: Any) -> dict[str, int] | None:
    """Read the bytes that a device has and uses; None where it does not say, as a CPU."""
    stats = None if device.platform == "cpu" else device.memory_stats()
    return {"limit": stats["bytes_limit"], "used": stats["bytes_in_use"]} if stats and "bytes_limit" in stats else None


def default_mesh() -> dict[str, Any]:
    """Lay the devices out for a model of unknown size, which is split over as many as there are, up to 8."""
    from hypersd_jax.weights.mesh import make_mesh

    mesh = make_mesh(fsdp="auto")
    return {name: int(size) for name, size in mesh.shape.items()}


def hardware(root: Path = ROOT) -> dict[str, Any]:
    """List the device files by which the system names GPUs and TPU chips, whether JAX sees them or not."""
    dev = root / "dev"
    gpus = [path for path in dev.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    chips = [*dev.glob("accel[0-9]*"), *dev.glob("vfio/[0-9]*")]
    return {"gpus": sorted(map(str, gpus)), "tpus": sorted(map(str, chips))}
