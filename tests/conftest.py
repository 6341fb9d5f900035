"""Settings that every test runs under."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny networks spend their time in the compiler, so it optimises less; the arithmetic stays float32.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")

try:  # the torch-free suite runs without it
    import torch
except ImportError:
    pass
else:
    torch.set_num_threads(1)
