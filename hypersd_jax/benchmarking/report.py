"""The files of `hypersd benchmark sampling`: rows as JSON, a table, and a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hypersd_jax.benchmarking.apis import TRANSFER
from hypersd_jax.benchmarking.measure import PROCESS
from hypersd_jax.benchmarking.phases import DECODE, DENOISE, TEXT
from hypersd_jax.weights.tensors import replacing

PHASES = {TEXT: "text encoding", DENOISE: "denoising", DECODE: "decoding", TRANSFER: "copying to the host"}
PHASE_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")
API_COLOURS = {"pmap": "#aa3377", "jit": "#444444", "shard_map": "#aaaaaa"}
SHARED_CPU = (
    "These devices share the cores of one CPU. So the ratios between the APIs mean something here, and how fast "
    "several devices are beside one does not."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All that the files say.

    Attributes:
        made: date and versions, in a line.
        command: that made it.
        device: number and kind of the devices.
        shared_cpu: whether several devices are one CPU.
        versions: by package.
        settings: of all rows.
        rows: of `measure`.
    """

    made: str
    command: str
    device: str
    shared_cpu: bool
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def notes(self) -> list[str]:
        """What the figures are, and are not."""
        tolerance = self.settings["tolerance"]
        notes = [
            "Seconds are medians of calls that the APIs made in turns. Each phase is waited for before the next "
            "begins, and holds the moving of its inputs to the devices. Weights are whole on every device, images are "
            "split evenly.",
            "Compiling is apart: tracing and compiling of the programs that a row uses, without a cache. Those of text "
            "and decoding are the same for all steps of a batch size, and count in each of its rows.",
            f"Peak memory: {_memory_of(self.rows)}",
            "Program memory is what the largest program holds on a device: arguments, results and temporaries.",
            f"The root mean squared difference of an image between two APIs is at most {tolerance:g} of 0..1, or the "
            "benchmark fails. The largest difference in the table is of a single value, to any other API.",
        ]
        return [SHARED_CPU, *notes] if self.shared_cpu else notes


def write_benchmark(folder: Path, benchmark: Benchmark) -> None:
    """Write results.json, results.md and results.png into a folder, each at once or not at all."""
    content = {key: value for key, value in dataclasses.asdict(benchmark).items() if key != "shared_cpu"}
    rows = content.pop("rows")
    text = json.dumps({**content, "notes": benchmark.notes, "rows": rows}, indent=1, allow_nan=False)
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    with replacing(folder / "results.md") as temporary:
        temporary.write_text(markdown(benchmark), encoding="utf-8")
    with replacing(folder / "results.png") as temporary:
        plot(benchmark).savefig(temporary, format="png", dpi=130)


def markdown(benchmark: Benchmark) -> str:
    """The page: what was measured, the table, the plot and the notes."""
    settings = benchmark.settings
    about = (
        f"{settings['model']} with {' + '.join(settings['loras']) or 'no LoRA'}, {settings['sampler']}, guidance "
        f"{settings['guidance']:g}, {settings['width']}x{settings['height']} px, {settings['dtype']}, "
        f"{settings['repeats']} repeats."
    )
    lines = ["# Sampling by pmap, jit and shard_map", "", f"{benchmark.device}. {about}", ""]
    lines += [f"    {benchmark.command}", "", benchmark.made, "", *table(benchmark.rows), "", "![](results.png)", ""]
    lines += [f"* {note}" for note in benchmark.notes]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the Markdown table."""
    headings = ["steps", "batch", "API", "images/s", "s (quartiles)", *(f"{name}, ms" for name in PHASES.values())]
    headings += ["compiling, s", "peak memory, MiB", "program memory, MiB", "largest difference"]
    cells = [headings, ["---"] * len(headings)]
    for row in rows:
        quartiles = f"{row['seconds_quartile_1']:.4g}-{row['seconds_quartile_3']:.4g}"
        cells.append(
            [
                str(row["steps"]),
                str(row["batch"]),
                row["api"],
                f"{row['images_per_second']:.4g}",
                f"{row['seconds']:.4g} ({quartiles})",
                *(f"{1000 * row[f'{phase}_seconds']:.3g}" for phase in PHASES),
                f"{row['compile_seconds']:.1f}",
                _mebibytes(row["peak_memory_bytes"]),
                _mebibytes(row["program_bytes"]),
                "-" if row["largest_difference"] is None else f"{row['largest_difference']:.2g}",
            ]
        )
    return [f"| {' | '.join(line)} |" for line in cells]


def plot(benchmark: Benchmark) -> Figure:
    """Bars of images per second, and of the seconds of each phase, by API."""
    cases = list(dict.fromkeys((row["steps"], row["batch"]) for row in benchmark.rows))
    apis = list(dict.fromkeys(row["api"] for row in benchmark.rows))
    figure = Figure(figsize=(max(9.0, 3.4 * len(cases) + 2.0), 4.2), layout="constrained")
    figure.suptitle(f"Sampling: {benchmark.settings['model']}, {benchmark.device}", fontsize=10)
    speed, phases = figure.subplots(1, 2)
    width = 0.8 / len(apis)
    found = {(row["steps"], row["batch"], row["api"]): row for row in benchmark.rows}
    for number, api in enumerate(apis):
        offset = (number - (len(apis) - 1) / 2) * width
        chosen = [found[(*case, api)] for case in cases]
        at = [index + offset for index in range(len(cases))]
        rates = [row["images_per_second"] for row in chosen]
        spread = [
            [rate - row["batch"] / row["seconds_quartile_3"] for rate, row in zip(rates, chosen, strict=True)],
            [row["batch"] / row["seconds_quartile_1"] - rate for rate, row in zip(rates, chosen, strict=True)],
        ]
        speed.bar(at, rates, 0.9 * width, yerr=spread, capsize=3, color=API_COLOURS[api], label=api)
        _stack(phases, at, chosen, 0.9 * width, labelled=number == 0)
        for x, row in zip(at, chosen, strict=True):
            phases.annotate(api, (x, row["seconds"]), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    for axes in (speed, phases):
        axes.set_xticks(range(len(cases)), [f"{steps}, {batch}" for steps, batch in cases])
        axes.set_xlabel("sampling steps, images in a batch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.2)
        axes.set_axisbelow(True)
        axes.legend(fontsize=8)
    speed.set_ylabel("images per second (median, quartiles)")
    phases.set_ylabel("seconds of a batch, by phase (medians)")
    return figure


def _stack(axes: Axes, at: Sequence[float], rows: Sequence[Mapping[str, Any]], width: float, *, labelled: bool) -> None:
    below = [0.0] * len(rows)
    for (phase, name), colour in zip(PHASES.items(), PHASE_COLOURS, strict=True):
        heights = [row[f"{phase}_seconds"] for row in rows]
        axes.bar(at, heights, width, bottom=below, color=colour, label=name if labelled else None)
        below = [low + height for low, height in zip(below, heights, strict=True)]


def _memory_of(rows: Sequence[Mapping[str, Any]]) -> str:
    rises = "It only rises within a process: a row holds what the rows above it needed too."
    if any(row["memory_of"] == PROCESS for row in rows):
        return f"the resident set of the whole process, compiler and all, for these devices count no bytes. {rises}"
    return f"the most bytes in use on a device. {rises}"


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f}"
