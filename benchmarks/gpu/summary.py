"""README.md and results.json of a folder of rows. Needs Python's own library alone, and rows of any of the parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import environment_file
from benchmarks.gpu.kernels import grouped
from benchmarks.gpu.rows import Row, read_rows, reason_of
from benchmarks.gpu.work import SIDES

STATUSES = ("done", "left out", "failed", "out of time", "no time left", "stopped")
GIB = 2**30
TERA = 1e12

Section = Callable[[Sequence[Row], Sequence[Row]], list[str]]


def summarise(folder: Path) -> None:
    """Write both files from the rows that there are by now."""
    rows, about = read_rows(folder), environment_file.read(folder)
    _replace(folder / "results.json", json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    _replace(folder / "README.md", markdown(rows, about))


def _replace(file: Path, text: str) -> None:
    """Write a file so that the old one is there until the new one is whole."""
    new = file.with_name(f".{file.name}.tmp")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def markdown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Return the page: what was run on what, then a table of each kind of result."""
    device = (about.get("device") or {}).get("name", "an unknown device")
    sections = [f"# Measured on {device}", *_environment(about), "## Parts", *_parts(of(rows, "part"))]
    for title, kind, make in SECTIONS:
        found = of(rows, kind)
        if found:
            sections += [f"## {title}", *_made(make, found, rows)]
    return "\n\n".join(sections) + "\n"


def _made(make: Section, found: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """A mistake in one table must not hide the others: `results.json` has its rows."""
    try:
        return make(found, rows)
    except Exception as error:
        return [f"This table could not be made ({reason_of(error)}). Its rows are in `results.json`."]


def of(rows: Iterable[Row], kind: str) -> list[Row]:
    """Return the rows of a kind."""
    return [row for row in rows if row["kind"] == kind]


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; None is an empty cell."""
    written = [
        ["" if cell is None else str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *written])


def milliseconds(row: Row | None, key: str = "median") -> str | None:
    """Return a time of a row as it stands in a table."""
    return None if row is None or row.get(key) is None else f"{1000 * row[key]:.4g}"


def gibibytes(count: float | None) -> str | None:
    """Return bytes in GiB as they stand in a table."""
    return None if count is None else f"{count / GIB:.2f}"


def teraflop(count: float | None) -> str | None:
    """Return a number of operations in TFLOP as it stands in a table."""
    return None if count is None else f"{count / TERA:.4g}"


def percent(value: float | None) -> str | None:
    """Return a share as it stands in a table."""
    return None if value is None else f"{100 * value:.1f} %"


def _environment(about: dict[str, Any]) -> list[str]:
    if not about:
        return ["What it was measured on is not known: the part `environment` has written nothing."]
    versions = ", ".join(f"{name} {number}" for name, number in about.get("versions", {}).items())
    lines = [
        f"{about.get('date')}, commit {about.get('commit')}, Python {about.get('python')}, {about.get('cores')} cores."
    ]
    if (about.get("device") or {}).get("platform") == "cpu":
        lines.append("**Tiny shapes on a CPU: this tries the benchmark and measures nothing.**")
    if about.get("nvidia-smi"):
        lines.append("`" + "`, `".join(about["nvidia-smi"].splitlines()) + "`")
    return [*lines, versions]


def _parts(rows: Sequence[Row]) -> list[str]:
    count = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
    counted = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    lines = [(row["part"], row["status"], f"{row['seconds']:.0f}", row["reason"]) for row in rows]
    return [f"{counted or 'none yet'}.", table(("part", "status", "s", "why"), lines)]


def _tests(found: Sequence[Row], _rows: Sequence[Row]) -> list[str]:
    lines = [(f"`{row['test']}`", row["outcome"], f"{row['seconds']:.1f}", row["reason"]) for row in found]
    return [table(("test", "outcome", "s", "why"), lines)]


def _sampling(found: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    sections = []
    for family in dict.fromkeys(row["family"] for row in found):
        known = {(row["side"], row["batch"], row["what"]): row for row in found if row["family"] == family}
        lines = []
        for batch, what in dict.fromkeys((batch, what) for _, batch, what in known):
            ours, theirs = (known.get((side, batch, what)) for side in SIDES)
            times = [row.get("median") if row else None for row in (ours, theirs)]
            ratio = f"{times[0] / times[1]:.2f}" if times[0] and times[1] else None
            peaks = [gibibytes(row.get("peak")) if row else None for row in (ours, theirs)]
            firsts = [f"{row['first']:.1f}" if row and "first" in row else None for row in (ours, theirs)]
            errors = "; ".join(row["error"] for row in (ours, theirs) if row and "error" in row)
            lines.append((what, batch, *map(milliseconds, (ours, theirs)), ratio, *peaks, *firsts, errors))
        head = ("", "batch", "here, ms", "diffusers, ms", "ratio", "here, GiB", "diffusers, GiB")
        sides = [_side(row) for row in of(rows, "side") if row["family"] == family]
        sections += [
            f"### {family}",
            " ".join(sides),
            table((*head, "here, first call, s", "diffusers, first call, s", "error"), lines),
        ]
    return [*sections, SAMPLING_NOTE]


def _side(row: Row) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    return f"{row['side']}: {versions}{', ' + row['how'] if 'how' in row else ''}, on {row['device']}."


def _training(found: Sequence[Row], _rows: Sequence[Row]) -> list[str]:
    lines = [
        (
            row["family"],
            row["case"],
            row["batch"],
            "yes" if row["remat"] else "no",
            milliseconds(row),
            teraflop(row["flops"]),
            percent(row["mfu"]),
            gibibytes(row["peak"]),
            gibibytes(row["plan"] and sum(row["plan"].values())),
            "before" if row["compiled before"] else f"{row['compile']:.0f}",
        )
        for row in found
    ]
    head = ("model", "stage", "batch", "remat", "ms", "TFLOP", "MFU", "peak, GiB", "XLA's plan, GiB", "compile, s")
    dtypes = ", ".join(dict.fromkeys(f"{row['dtype']}, rank {row['rank']}" for row in found))
    unknown = dict.fromkeys(row["device"] for row in found if row["mfu"] is None)
    peaks = [f"No MFU: `benchmarks/gpu/peaks.py` has no published peak of {', '.join(unknown)}."] * bool(unknown)
    return [f"{dtypes}.", table(head, lines), *peaks, TRAINING_NOTE]


def _programs(found: Sequence[Row], _rows: Sequence[Row]) -> list[str]:
    groups = [grouped(row["kernels"]) for row in found]
    names = [name for name in groups[0] if any(group[name] for group in groups)]
    lines = [
        (
            row["family"],
            row["program"],
            teraflop(row["flops"]),
            percent(row.get("mfu")),
            *(group[n] for n in names),
        )
        for row, group in zip(found, groups, strict=True)
    ]
    return [table(("model", "program", "TFLOP", "MFU", *names), lines), PROGRAMS_NOTE]


def _attention(found: Sequence[Row], _rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in found:
        shape = f"{row['queries']} x {row['keys']}, {row['heads']} heads of {row['width']}"
        if "failure" in row:
            lines.append((row["where"], shape, row["failure"]))
            continue
        lines.append(
            (
                row["where"],
                shape,
                row["chosen"] + ", **fell back to XLA's form**" * row["fell back"],
                ", ".join(f"{count} {name}" for name, count in row["kernels"].items()),
                "yes" if row["good"] else "**no**",
                f"{max(row['error']):.1e} / {max(row['xla error']):.1e}",
                milliseconds(row, "forward"),
                milliseconds(row, "forward and backward"),
                milliseconds(row, "xla forward and backward"),
            )
        )
    head = (
        "where",
        "queries x keys",
        "chosen",
        "kernels",
        "agrees",
        "error / XLA's",
        "forward, ms",
        "both, ms",
        "XLA, both, ms",
    )
    return [table(head, [(*line, *[None] * (len(head) - len(line))) for line in lines]), ATTENTION_NOTE]


SAMPLING_NOTE = (
    "Medians of several calls after two that warm up; batches of images of one prompt, random weights, no guidance. "
    "Text: encoding the prompts; unet: one call; decode: latents on the device to images as NumPy arrays; image: "
    "prompts to images as NumPy arrays, here one compiled step at a time (`stepwise`). First calls compile, unless "
    "an earlier run has left the program in `outputs/gpu-cache`. Memory here is the most that the process has held "
    "by then, compilation included, for JAX cannot forget it; of PyTorch it is that of the piece alone. The ratio "
    "is time here over PyTorch's."
)
TRAINING_NOTE = (
    "Milliseconds are of one training step. FLOPs are XLA's count of the compiled step, what is computed again "
    "included, with those of cuDNN's attention added, which XLA does not count; MFU is these by the card's published "
    "dense bf16 peak (`benchmarks/gpu/peaks.py`). A DMD step is from prompts alone, with one update of the fake score "
    "model. The peak is the process's, compilation included; the plan is of arguments, temporary memory and outputs."
)
PROGRAMS_NOTE = (
    "Counts of kernels in each compiled program by the names in its HLO; a loop's are counted once. A cuDNN fusion "
    "may be a convolution or a product; a product of XLA's own, without a library, is slow on a GPU. `results.json` "
    "has the names."
)
ATTENTION_NOTE = (
    "bfloat16, batch 2. Errors are relative to float32, the largest of output and gradients; a kernel agrees if "
    "none is twice XLA's own."
)
SECTIONS: tuple[tuple[str, str, Section], ...] = (
    ("Tests", "test", _tests),
    ("Sampling", "sampling", _sampling),
    ("Training steps", "training", _training),
    ("Kernels", "program", _programs),
    ("Attention", "attention", _attention),
)
"""Title, kind of rows, and what makes the table of them."""
