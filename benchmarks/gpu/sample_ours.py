"""Sample with this package: UNet calls, decoding and whole images, at batch 1 and 8."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import jax

from benchmarks.gpu import models
from benchmarks.gpu.kernels import live_programs, program_row
from benchmarks.gpu.peaks import mfu
from benchmarks.gpu.rows import Rows, reason_of
from benchmarks.gpu.timing import timed
from benchmarks.gpu.work import BATCHES, SIDES, each_measurement
from benchmarks.model_configs import PIXELS
from benchmarks.sides.ours import work

PROGRAMS = {"jit_predict": "UNet call", "jit_scan": "step", "jit_decode": "decode", "jit_encode_prompts": "text"}


def sample(family: str, rows: Rows, *, tiny: bool) -> None:
    """Measure a family; a piece that fails, say for want of memory, is a row that says so."""
    device = models.start(tiny=tiny)
    pipe = models.pipeline(family, tiny=tiny)
    rows.add("side", side=SIDES[0], family=family, device=device.device_kind, versions={"jax": version("jax")})
    pixels = pipe.native_size[0] if tiny else PIXELS[family]
    seen = set(live_programs(device))
    for batch in BATCHES:
        pieces = work(pipe, pixels, batch, stepwise=True)
        for name, piece in each_measurement(pieces):
            found: dict[str, Any] = {"side": SIDES[0], "family": family, "batch": batch, "what": name}
            try:
                found |= timed(piece)
            except Exception as error:  # the later pieces may need less
                rows.add("sampling", **found, error=reason_of(error))
                continue
            rows.add("sampling", **found, peak=models.peak_bytes(device))
            for key, (program, executable) in live_programs(device).items():
                if key in seen or program not in PROGRAMS:
                    continue
                seen.add(key)
                _add_program(rows, f"{PROGRAMS[program]}, batch {batch}", executable, found, device)


def _add_program(rows: Rows, name: str, executable: Any, found: dict[str, Any], device: jax.Device) -> None:
    """Describe a new program, and how near the card's peak it runs where it is all that was timed."""
    row = program_row(
        name,
        lambda: executable.hlo_modules()[0].to_string(),
        executable.cost_analysis,
        executable.get_compiled_memory_stats,
    )
    reached = mfu(row["flops"], found["median"], device.device_kind) if found["what"] == "unet" else None
    rows.add("program", family=found["family"], **row, mfu=reached)
