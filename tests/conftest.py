"""Settings that every test runs under."""

from __future__ import annotations

import os
import signal
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Many tests compile the same programs: this process, its workers and what they start share them until the session ends.
# JAX reads these variables when it is first imported, which is below.
_PROGRAMS = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="hypersd_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax

from tests.helpers.quick import QUICK

# Tiny networks spend their time in the compiler, so it optimises less; the arithmetic stays float32.
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items()))
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` has it, which the tests of signals are not of
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:  # the torch-free suite runs without it
    import torch
except ImportError:
    pass
else:
    torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    if _PROGRAMS is not None:
        _PROGRAMS.cleanup()
