"""How programs are compiled: the backend's options, and where compiled programs are kept."""

from __future__ import annotations

import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.paths import cache_folder


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
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Programs that call oneDNN (`compiler_options`) cannot be written there, of which JAX would warn each time.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry .*MemoryError")
