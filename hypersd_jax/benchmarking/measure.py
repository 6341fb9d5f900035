"""Time, memory and images of several APIs on the same work, taken in turns."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from hypersd_jax.benchmarking.apis import TRANSFER, Run, Runner
from hypersd_jax.benchmarking.phases import DECODE, DENOISE, TEXT, Workload
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline.arguments import about_not_finite, not_finite
from hypersd_jax.progress import COMPILING, begin_clock

Row = dict[str, Any]
DEVICE, PROCESS = "device, peak in use", "process, peak resident set"
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.005}
"""Root mean squared difference, of 0..1, that two APIs' images of one seed may have, by the networks' data type."""


class ImagesDiffer(Exception):
    """Two APIs sampled different images from the same seed."""


def measure(
    runners: Mapping[str, Runner],
    work: Workload,
    *,
    repeats: int,
    dtype: str,
    bar: tqdm[Any],
) -> list[Row]:
    """Run the same work by each API, first once for its programs and images, then in turns.

    Args:
        runners: by API.
        work: what to sample.
        repeats: timed calls of each API; the order changes from one repeat to the next.
        dtype: that the networks compute in.
        bar: counts the calls.

    Returns:
        a row for each API, of medians over the repeats.

    Raises:
        ImagesDiffer: by more than `TOLERANCE`.
        UserError: images are not finite.
    """
    names = list(runners)
    first: dict[str, Run] = {}
    peaks: dict[str, tuple[int, str]] = {}
    title = f"{work.steps} step{'s' if work.steps != 1 else ''}, batch {work.batch}"
    for name in names:
        bar.set_description(f"{title}, {name}: {COMPILING}")
        first[name] = runners[name].run(work)
        peaks[name] = peak_memory(jax.local_devices())
        bar.update()
    differences = _differences({name: run.images for name, run in first.items()}, dtype, work)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    begin_clock(bar, title, int(bar.n))
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(runners[name].run(work).seconds)
            bar.update()
    return [
        {
            "api": name,
            "steps": work.steps,
            "batch": work.batch,
            **_medians(times[name], work.batch),
            "compile_seconds": first[name].compile_seconds,
            "peak_memory_bytes": peaks[name][0],
            "memory_of": peaks[name][1],
            "program_bytes": first[name].program_bytes,
            **differences[name],
        }
        for name in names
    ]


def peak_memory(devices: Sequence[jax.Device]) -> tuple[int, str]:
    """The most bytes that any of the devices held at once, or this process, and which of these it is.

    A CPU's devices do not count their bytes, so that there it is the process, with all that it ever held: the peak only
    rises, on a device too.
    """
    found = [stats.get("peak_bytes_in_use") for device in devices if (stats := device.memory_stats())]
    if found and None not in found:
        return max(found), DEVICE
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024, PROCESS


def _medians(times: Sequence[Mapping[str, float]], batch: int) -> dict[str, float]:
    totals = [sum(each.values()) for each in times]
    seconds = statistics.median(totals)
    low, high = np.quantile(totals, (0.25, 0.75))
    return {
        "images_per_second": batch / seconds,
        "seconds": seconds,
        "seconds_quartile_1": float(low),
        "seconds_quartile_3": float(high),
        **{
            f"{phase}_seconds": statistics.median(each[phase] for each in times)
            for phase in (TEXT, DENOISE, DECODE, TRANSFER)
        },
    }


def _differences(images: Mapping[str, np.ndarray], dtype: str, work: Workload) -> dict[str, dict[str, float | None]]:
    """How far each API's images (B, H, W, 3) lie from any other's; None for one API alone.

    By API: ``largest_difference`` of a value, and ``largest_distance``, of an image, the root mean squared difference.
    The latter is what is tolerated or not, since in half precision rounding alone moves single values far.
    """
    for found in images.values():
        if broken := not_finite(found):
            raise UserError(about_not_finite(broken, len(found), dtype))
    largest: dict[str, dict[str, float | None]] = {
        name: {"largest_difference": None, "largest_distance": None} for name in images
    }
    for one, other in itertools.combinations(images, 2):
        apart = np.abs(images[one] - images[other])
        distance = float(np.sqrt(np.mean(np.square(apart), axis=(1, 2, 3))).max())
        if distance > TOLERANCE[dtype]:
            raise ImagesDiffer(
                f"{one} and {other} sample different images at {work.steps} steps, batch {work.batch}: they lie "
                f"{distance:.2g} of 0..1 apart, and in {dtype} {TOLERANCE[dtype]:g} is tolerated"
            )
        for name in (one, other):
            for key, value in (("largest_difference", float(apart.max())), ("largest_distance", distance)):
                largest[name][key] = max(value, largest[name][key] or 0.0)
    return largest
