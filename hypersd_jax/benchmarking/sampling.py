"""``hypersd benchmark sampling``: load a model, measure every number of steps and images by every API, write files."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from tqdm import tqdm

from hypersd_jax.bases import load_base
from hypersd_jax.benchmarking.apis import Runner
from hypersd_jax.benchmarking.measure import TOLERANCE, Row, measure
from hypersd_jax.benchmarking.phases import make_phases, make_workload
from hypersd_jax.benchmarking.report import Benchmark, write_benchmark
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.provenance import made_line, typed_command
from hypersd_jax.paths import parse_lora
from hypersd_jax.pipeline import Pipeline, parse_dtype
from hypersd_jax.png_text import name_of
from hypersd_jax.weights.components import EMBEDDED, assets
from hypersd_jax.weights.mesh import make_mesh

FAKE_DEVICES = "JAX_NUM_CPU_DEVICES"
BATCH = 8
"""Images of a batch where none are asked for, or the next multiple of the devices."""


def run_sampling(options: argparse.Namespace) -> list[Row]:
    """Do what the options of ``hypersd benchmark sampling`` say; returns the rows of results.json.

    Raises:
        UserError: one line naming the option or file at fault.
        ImagesDiffer: two APIs sampled different images.
    """
    devices = jax.local_devices()
    batches = _batches(options.batch_sizes, len(devices))
    mesh = make_mesh(len(devices), 1, devices=devices)
    dtype = parse_dtype(options.dtype)
    # Without a mesh, for the APIs that give its functions a share of the batch. First, so that its weights are gone
    # before memory is measured.
    local = load_base(options.model, dtype=dtype).without_weights()
    pipe = Pipeline.from_pretrained(options.model, dtype=dtype, mesh=mesh)
    loras = [parse_lora(text) for text in options.lora] or _embedded_lora(options.model)
    # Named by number: the same file may be given twice, at two scales.
    for number, (file, scale) in enumerate(loras):
        pipe.load_lora(file, scale, name=f"{number}: {file}")
    how = {"sampler": options.sampler, "guidance": options.guidance, "size": options.size}
    works = [make_workload(pipe, steps=steps, batch=batch, **how) for batch in batches for steps in options.steps]
    settings = works[0].settings
    bases = {api: pipe.base.without_weights() if api == "jit" else local for api in options.apis}
    model = pipe.active()
    runners = {api: Runner(api, make_phases(base, settings), model, mesh) for api, base in bases.items()}
    rows: list[Row] = []
    with tqdm(total=len(works) * len(runners) * (1 + options.repeats), unit="call") as bar:
        for work in works:
            rows += measure(runners, work, repeats=options.repeats, dtype=jnp.dtype(dtype).name, bar=bar)
    benchmark = Benchmark(
        made=made_line(),
        command=_command(options.arguments),
        device=_device(devices),
        shared_cpu=devices[0].platform == "cpu" and len(devices) > 1,
        versions=_versions(),
        settings={
            "model": name_of(options.model),
            "loras": [f"{name_of(file)}@{scale:g}" for file, scale in loras],
            "dtype": jnp.dtype(dtype).name,
            "sampler": settings.sampler,
            "guidance": settings.guidance,
            "height": settings.height,
            "width": settings.width,
            "repeats": options.repeats,
            "tolerance": TOLERANCE[jnp.dtype(dtype).name],
        },
        rows=rows,
    )
    write_benchmark(options.output, benchmark)
    return rows


def _batches(asked: Sequence[int] | None, devices: int) -> list[int]:
    """The batch sizes, each of which the devices must divide: what is padded would be timed as if it were wanted."""
    if asked is None:
        return [-(-BATCH // devices) * devices]
    for batch in asked:
        if batch % devices:
            raise UserError(
                f"--batch-sizes {batch}: cannot be split evenly over {devices} devices; take a multiple of {devices}"
            )
    return list(asked)


def _embedded_lora(model: str) -> list[tuple[Path, float]]:
    """The LoRA that ships for every few steps of the embedded model, by which all of its rows sample."""
    return [(assets() / "loras" / "unified.safetensors", 1.0)] if model == EMBEDDED else []


def _device(devices: Sequence[jax.Device]) -> str:
    kind = f"{len(devices)} x {devices[0].device_kind}"
    return f"{kind}, on {os.cpu_count()} cores" if devices[0].platform == "cpu" else kind


def _command(arguments: Sequence[str]) -> str:
    """The command, behind the variable that makes several devices of a CPU."""
    count = os.environ.get(FAKE_DEVICES)
    return (f"{FAKE_DEVICES}={count} " if count else "") + typed_command(arguments)


def _versions() -> dict[str, str]:
    package: Any = importlib.import_module("hypersd_jax")
    return {
        "hypersd_jax": package.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }
