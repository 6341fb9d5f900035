"""What the programs need of a TPU, compiled for chips that are not there: ``python benchmarks/tpu_aot.py``.

Needs the package `libtpu`, beside the `jax` of its version (`pip install 'jax[tpu]'`), and no TPU. Every row is
compiled in a process of its own from shapes alone, in bfloat16, and kept in benchmarks/results/tpu_aot/rows; a row that
is there is not compiled again (``--again`` does), so that the command resumes. A chip's share of arguments, temporary
memory and peak, its FLOPs and bytes, and what it sends to others. The roofline is the larger of FLOPs and bytes over
the chip's published peaks: what no run can be faster than, not what one takes. A kernel of JAX's own (splash attention)
counts bytes and no FLOPs.

All rows are compiled with the compiler's least effort, without which they take hours on few cores:
their FLOPs are the same, their temporary memory is an upper bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.sides.training import CASES
from hypersd_jax.planning.peaks import DEVICES

RESULTS = ROOT / "benchmarks" / "results" / "tpu_aot"
GIB = 2**30

LATENTS = {"sd15": 64, "sdxl": 128}
LINKS = {"v5e": 200e9, "v6e": 448e9, "v5p": 600e9}
"""Bytes a second through all links of a chip within a slice, as published."""
CHIPS = (8, 64, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A program on a mesh.

    Attributes:
        family: sd15 or sdxl.
        program: of benchmarks/aot/programs.py.
        topology: of the chips, as libtpu names it.
        data, fsdp: the mesh.
        rows: samples on all chips together; of a training step, of a micro-batch.
        accumulate: micro-batches.
        remat: recompute activations.
    """

    family: str
    program: str
    topology: str = "v5e:2x4"
    data: int = 8
    fsdp: int = 1
    rows: int = 8
    accumulate: int = 1
    remat: bool = False

    @property
    def name(self) -> str:
        """What the row's file is called."""
        mesh = f"{self.topology.replace(':', '-')}-{self.data}x{self.fsdp}"
        more = f"-a{self.accumulate}" * (self.accumulate > 1) + "-remat" * self.remat
        return f"{self.family}-{self.program}-{mesh}-b{self.rows}{more}"

    @property
    def title(self) -> str:
        """What the table calls it."""
        parts = [f"{self.family} {self.program}", f"{self.topology} {self.data}x{self.fsdp}", f"{self.rows} rows"]
        parts += [f"accumulate {self.accumulate}"] * (self.accumulate > 1) + ["remat"] * self.remat
        return ", ".join(parts)


_LARGE: dict[str, Any] = {"family": "sdxl", "data": 2, "fsdp": 4}
ROWS = [
    *(Row(family="sd15", program=name) for name in ("unet", "text", "decode", "encode", "sampler-1", "sampler-4")),
    Row(family="sd15", program="decode", rows=16),
    Row(family="sd15", program="sampler-4", rows=16),
    Row(family="sd15", program="tscd", rows=32, remat=True),
    *(Row(program=name, **_LARGE) for name in ("unet", "text", "decode", "encode", "sampler-1", "sampler-4")),
    Row(family="sd15", program="tscd-encoder", rows=32, remat=True),
    Row(family="sd15", program="dmd2", rows=8, remat=True),
    Row(family="sd15", program="dmd", rows=8, remat=True),
    Row(program="tscd", accumulate=64, remat=True, **_LARGE),
    Row(family="sdxl", program="tscd", topology="v6e:2x4", data=2, fsdp=4, accumulate=64, remat=True),
    Row(family="sdxl", program="tscd", topology="v5e:8x8", data=16, fsdp=4, rows=64, accumulate=8, remat=True),
    Row(program="dmd2", accumulate=64, remat=True, **_LARGE),
]
"""In the order in which they are compiled: those that are done soon first."""


def compile_row(row: Row) -> dict[str, Any]:
    """Lower and compile a row in this process, and say what it needs."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    from jax.experimental import topologies

    from benchmarks.aot.hlo import collectives
    from benchmarks.aot.model import AbstractModel
    from benchmarks.aot.programs import PROGRAMS, Inputs
    from hypersd_jax.training import make_mesh

    jax.config.update("jax_optimization_level", "O0")
    chips = topologies.get_topology_desc(platform="tpu", topology_name=row.topology).devices
    mesh = make_mesh(row.data, row.fsdp, devices=chips)
    model = AbstractModel.of(row.family, mesh, remat=row.remat)
    given = Inputs(model=model, latent=LATENTS[row.family], rows=row.rows, accumulate=row.accumulate)
    begin = time.perf_counter()
    lowered = PROGRAMS[row.program](given)
    lowering, begin = time.perf_counter() - begin, time.perf_counter()
    compiled = lowered.compile()
    compiling = time.perf_counter() - begin
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        **dataclasses.asdict(row),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "lowering_seconds": round(lowering, 1),
        "compile_seconds": round(compiling, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "peak_bytes": getattr(memory, "peak_memory_in_bytes", 0),
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "collectives": collectives(compiled.as_text()),
        "host_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
    }


def roofline_ms(row: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds that FLOPs and bytes take at the chip's published peaks."""
    peaks = DEVICES[row["topology"].partition(":")[0]]
    return row["flops"] / peaks.flops * 1e3, row["bytes_accessed"] / peaks.bandwidth * 1e3


def table(rows: list[dict[str, Any]]) -> str:
    """The page: a line for each row that was compiled."""
    lines = [
        "# Compiled for TPUs",
        "",
        "`python benchmarks/tpu_aot.py`; no TPU was there. bfloat16, rank 64, a chip's share of everything; of a step",
        "with micro-batches FLOPs, bytes and collectives are of one. The script says what the columns mean.",
        "",
        "| program, mesh, samples | arguments, GiB | temporary, GiB | peak, GiB | TFLOP | GB | roofline, ms: FLOPs,"
        " bytes | sent, GB | compile, s | jax, date |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {Row(**_settings(row)).title} | does not compile: {row['error']} |" + " |" * 8)
            continue
        sizes = [f"{row[f'{name}_bytes'] / GIB:.2f}" for name in ("argument", "temporary", "peak")]
        sent = [f"{kind} {own['bytes'] / 1e9 / turns(row):.2f}" for kind, own in sorted(row["collectives"].items())]
        work = [f"{row['flops'] / 1e12:.2f}", f"{row['bytes_accessed'] / 1e9:.1f}"]
        time_cells = ["{:.1f}, {:.1f}".format(*roofline_ms(row)), ", ".join(sent), f"{row['compile_seconds']:.0f}"]
        cells = [Row(**_settings(row)).title, *sizes, *work, *time_cells, f"{row['jax']}, {row['date']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *scaling_table(rows)]) + "\n"


def scaling(row: dict[str, Any], chips: int) -> float:
    """The share of a micro-batch's time in which a chip computes, were nothing sent while it does.

    More chips are more of the mesh's `data` at the same work a chip: what is gathered within `fsdp` stays, and
    gradients are summed in a ring, 2 (n - 1) / n times their bytes through each chip.
    """
    computing, kinds = max(roofline_ms(row)) / 1e3, row["collectives"]
    sent = {kind: own["bytes"] / turns(row) for kind, own in kinds.items()}
    ring = 2 * (chips - 1) / chips * sent.pop("all-reduce", 0.0)
    return computing / (computing + (sum(sent.values()) + ring) / LINKS[row["topology"].partition(":")[0]])


def scaling_table(rows: list[dict[str, Any]]) -> list[str]:
    """From the chips that a step was compiled for to more of them, on paper."""
    steps = [row for row in rows if row["program"] in CASES and "error" not in row]
    if not steps:
        return []
    lines = [
        "",
        "## More chips, on paper",
        "",
        "The share of its time in which a chip computes at the roofline, were nothing sent meanwhile: at the same",
        "work a chip, with the links' published bandwidth (v5e 200, v6e 448, v5p 600 GB/s a chip). A chip that",
        "computes more slowly than the roofline waits for a smaller share. Up to 256 v5e or v6e chips are one slice.",
        "",
        f"| step | {' | '.join(f'{chips} chips' for chips in CHIPS)} |",
        "|" + "---|" * (1 + len(CHIPS)),
    ]
    for row in steps:
        shares = [f"{scaling(row, chips):.1%}" for chips in CHIPS]
        lines.append(f"| {Row(**_settings(row)).title} | {' | '.join(shares)} |")
    return lines


def turns(row: dict[str, Any]) -> int:
    """Micro-batches: the compiler counts a loop's body once in FLOPs and bytes, and so does the table what is sent."""
    return int(row["accumulate"])


def _settings(row: dict[str, Any]) -> dict[str, Any]:
    return {field.name: row[field.name] for field in dataclasses.fields(Row)}


def main() -> None:
    """Compile the rows that are missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to compile, as --list names them")
    parser.add_argument("--list", action="store_true", help="list the rows, and what is done of them")
    parser.add_argument("--again", action="store_true", help="compile rows that are done, too")
    parser.add_argument("--seconds", type=float, default=3 * 3600.0, help="that one row may take")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = {row.name: row for row in ROWS}
    if unknown := sorted(set(options.only or ()) - known.keys()):
        parser.error(f"--only: {unknown[0]} is no row; --list names them")
    if options.row:
        print(json.dumps(compile_row(known[options.row])))
        return
    folder = options.results / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    for name in known:
        file = folder / f"{name}.json"
        if options.list:
            print(name, "done" if file.exists() else "")
        elif (options.again or not file.exists()) and name in (options.only or known):
            file.write_text(json.dumps(_in_a_process(known[name], options.seconds), indent=1) + "\n", encoding="utf-8")
            _write_table(options.results, list(known))


def _in_a_process(row: Row, seconds: float) -> dict[str, Any]:
    print(f"{row.name}: compiling", flush=True)
    command = [sys.executable, __file__, "--row", row.name]
    settings = {**dataclasses.asdict(row), "date": datetime.date.today().isoformat()}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {**settings, "error": f"not done in {seconds:.0f} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    print("\n".join(lines[-3:]), file=sys.stderr)
    return {**settings, "error": lines[-1][:200]}


def _write_table(results: Path, names: list[str]) -> None:
    files = [results / "rows" / f"{name}.json" for name in names]
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    (results / "README.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
