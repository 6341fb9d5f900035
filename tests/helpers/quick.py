"""`jax.jit` for tests: tiny networks spend their time in the compiler, so it optimises less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# Four times faster to compile on CPU than the defaults; the arithmetic stays float32. The pass that is left out makes
# two kernels, in LLVM modules of their own, of every large sum. The last option went with jax 0.11, and XLA ends the
# process at an option that it does not know.
QUICK: dict[str, int | bool | str] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_disable_hlo_passes": "tree_reduction_rewriter",
}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False


def quick_jit(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """Compile `function` with little optimisation."""
    return jax.jit(function, compiler_options=QUICK, **kwargs)
