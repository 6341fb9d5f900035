"""Settings that every test runs under."""

from __future__ import annotations

import os

from tests.helpers.quick import QUICK

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny networks spend their time in the compiler, so it optimises less; the arithmetic stays float32.
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items()))

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")

try:  # the torch-free suite runs without it
    import torch
except ImportError:
    pass
else:
    torch.set_num_threads(1)
