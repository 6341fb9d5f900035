"""Compilation of programs: the backend's options, and where compiled programs are kept."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.paths import cache_folder

MOST_BYTES = 4 * 2**30
"""What the user's folder of compiled programs may hold; a program takes 0.1 to 50 MB."""


def compiler_options(dtype: Any, platform: str | None = None) -> dict[str, Any]:
    """The backend's options for a program that runs networks in `dtype`; the only place that knows any.

    On a CPU (`platform`; None: JAX's default) bfloat16 convolutions and matmuls go to oneDNN, which uses the
    processor's own bfloat16 instructions: two to twelve times XLA's speed for SD's 3x3 convolutions on jax 0.12, with
    AVX-512 alone. Without the second option most matmuls would go to XLA's own library instead: a UNet call of SD 1.5
    at 512 px took 1.71 s with it and 1.32 s without. Older versions have no such kernels.
    """
    if (platform or jax.default_backend()) != "cpu" or jnp.dtype(dtype) != jnp.bfloat16:
        return {}
    if jax.__version_info__ < (0, 12):
        return {}
    return {"xla_cpu_experimental_onednn_custom_call": True, "xla_cpu_experimental_ynn_fusion_type": ""}


def use_compilation_cache() -> None:
    """Keep compiled programs between processes.

    In the folder that JAX_COMPILATION_CACHE_DIR names, or the user's; nowhere if none can be written.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and (folder := cache_folder("jax")) is not None:
        trim(folder, MOST_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _quieten()


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compile every program that a process compiles for the first time in here, whatever is kept: to time it."""
    config: Any = jax.config  # whose settings its type does not know
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)


def _quieten() -> None:
    """Warn at most once of a folder that cannot be read or written, where JAX does so for every program.

    Such a program is compiled again. One that calls oneDNN (`compiler_options`) can never be written, of which there is
    no warning at all.
    """
    config: Any = jax.config  # whose settings its type does not know
    folder = config.jax_compilation_cache_dir
    if folder and config.jax_enable_compilation_cache and "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(f"{folder}: new compiled programs cannot be kept here ({reason})", stacklevel=3)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry ")


def trim(folder: Path, most: int) -> None:
    """Delete the compiled programs that were used longest ago, until a folder holds at most ``most`` bytes.

    JAX's own limit (JAX_COMPILATION_CACHE_MAX_SIZE) locks the folder for every program and cannot take over a folder
    that was filled without it.
    """
    found = []
    with contextlib.suppress(OSError):
        for entry in folder.glob("*-cache"):
            about = entry.stat()
            found.append((max(about.st_atime, about.st_mtime), about.st_size, entry))
    left = sum(size for _, size, _ in found)
    for _, size, entry in sorted(found):
        if left <= most:
            return
        with contextlib.suppress(OSError):  # another process may have been quicker
            entry.unlink()
        left -= size
