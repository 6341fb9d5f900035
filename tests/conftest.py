"""Settings that every test runs under."""

from __future__ import annotations

import ctypes
import fnmatch
import gc
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Many tests compile the same programs: this process, its workers and what they start share them until the session ends.
# JAX reads these variables when it is first imported, which is below.
_PROGRAMS = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="hypersd_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

import jax

from tests.helpers.quick import QUICK

# What tests/gpu runs on: "gpu", or "cpu" in its place; without it those tests are skipped.
ON_GPU = os.environ.get("HYPERSD_GPU_TESTS") == "gpu"
# Tiny networks spend their time in the compiler, so it optimises less; the arithmetic stays float32.
if not ON_GPU:
    os.environ.setdefault("XLA_FLAGS", " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items()))
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cuda,cpu" if ON_GPU else "cpu")

from tests.helpers.tiny_model import smaller, tiny_model

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` has it, which the tests of signals are not of
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:  # the torch-free suite runs without it
    import torch
except ImportError:
    pass
else:
    torch.set_num_threads(1)

# Tracing makes many objects that are in no cycle, and a worker holds millions more: the collector would go through all
# of them time and again. It rests until the tests and what they import are there, which stay.
gc.set_threshold(50_000, 20, 50)
gc.disable()

# A worker that is larger than this forgets its programs before the next file; below it, files share them. One that has
# imported PyTorch and its company begins with a gigabyte.
_LARGE = 4 * 2**30


SLOW = Path(__file__).parent / "slow.txt"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that slow.txt lists; each line must name some where all files are collected, as with PyTorch."""
    patterns = [line.strip() for line in SLOW.read_text().splitlines() if line.strip() and not line.startswith("#")]
    named = set()
    for item in items:
        for pattern in patterns:
            if fnmatch.fnmatchcase(item.nodeid, f"tests/{pattern}".replace("[", "[[]")):
                item.add_marker("slow")
                named.add(pattern)
    gc.freeze()
    gc.enable()
    whole = config.args == config.getini("testpaths") and importlib.util.find_spec("torch") is not None
    if whole and (unknown := sorted({*patterns} - named)):
        raise pytest.UsageError(f"{SLOW}: no test is called {unknown[0]}")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Every file compiles programs of its own, which would fill a worker's memory file by file."""
    yield
    if _resident() < _LARGE:
        return
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # the compiler leaves holes that the C library would keep


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model for the runs of many files, which then share its training steps (`tests.helpers.short_runs`)."""
    return smaller(tiny_model(tmp_path_factory.mktemp("model")))


def _resident() -> float:
    """Bytes that this process holds now; as many as there can be where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else float("inf")


def pytest_unconfigure() -> None:
    if _PROGRAMS is not None:
        _PROGRAMS.cleanup()
