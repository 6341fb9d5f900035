"""Sample with diffusers on PyTorch: the same pieces, `torch.compile`, bfloat16, channels last, PyTorch's attention."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler

from benchmarks.gpu.rows import Rows, reason_of
from benchmarks.gpu.timing import timed
from benchmarks.gpu.work import BATCHES, SIDES, each_measurement
from benchmarks.model_configs import PIXELS, model_configs
from benchmarks.random_model import make_pipeline
from benchmarks.sides.theirs import work

MODE = "reduce-overhead"
"""CUDA graphs, without which a UNet call at batch 1 waits for the launches of its kernels."""


def sample(family: str, rows: Rows, *, tiny: bool) -> None:
    """Measure a family; a piece that fails, say for want of memory, is a row that says so."""
    if not (tiny or torch.cuda.is_available()):
        sys.exit(f"PyTorch {torch.__version__} has no GPU")
    device = "cpu" if tiny else "cuda"
    pipe = _pipeline(family, device, tiny=tiny)
    how = _compile(pipe, device, tiny=tiny)
    name = "cpu" if tiny else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "diffusers": version("diffusers"), "CUDA": torch.version.cuda}
    rows.add("side", side=SIDES[1], family=family, device=name, versions=versions, how=how)
    pixels = pipe.unet.config.sample_size * pipe.vae_scale_factor if tiny else PIXELS[family]
    finish = (lambda: None) if tiny else torch.cuda.synchronize
    for batch in BATCHES:
        for piece, call in each_measurement(work(pipe, pixels, batch)):
            found: dict[str, Any] = {"side": SIDES[1], "family": family, "batch": batch, "what": piece}
            if not tiny:
                torch.cuda.reset_peak_memory_stats()
            try:
                found |= timed(call, finish)
            except Exception as error:  # the later pieces may need less
                rows.add("sampling", **found, error=reason_of(error))
                continue
            rows.add("sampling", **found, peak=None if tiny else torch.cuda.max_memory_allocated())


def _pipeline(family: str, device: str, *, tiny: bool) -> Any:
    """Build the pipeline with random weights, on the device from the start."""
    torch.manual_seed(0)
    diffusers.utils.logging.disable_progress_bar()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        pipe = make_pipeline(model_configs(family, tiny=tiny))
    torch.set_default_dtype(torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # its table belongs to the CPU
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae):
        part.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return pipe


def _compile(pipe: Any, device: str, *, tiny: bool) -> str:
    """Compile UNet and decoder for each batch size, and say how; a tiny model is traced alone.

    Where a layer cannot be compiled, for want of Triton or of a C compiler, all stays eager.
    """
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False, **({"backend": "eager"} if tiny else {"mode": MODE})}
    try:
        torch.compile(torch.nn.Linear(8, 8, device=device), **how)(torch.ones(8, 8, device=device))
    except Exception as error:
        return f"eager, for torch.compile failed ({reason_of(error)})"
    pipe.unet = torch.compile(pipe.unet, **how)
    pipe.vae.decoder = torch.compile(pipe.vae.decoder, **how)
    return "torch.compile, " + ", ".join(f"{key} {value}" for key, value in how.items())
