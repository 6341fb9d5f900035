"""A plan as a JSON object, and as lines to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hypersd_jax.machine.text import bytes_text
from hypersd_jax.planning.plan import Plan, StagePlan
from hypersd_jax.planning.timing import Timed
from hypersd_jax.planning.topology import Compiled

UNKNOWN = "-"


def plan_json(plan: Plan, timed: Mapping[str, Timed] | None, compiled: Mapping[str, Compiled] | None) -> dict[str, Any]:
    """Make an object of JSON's types: bytes, seconds and operations as plain numbers, null for what is not known."""
    found = dataclasses.asdict(plan)
    found["stages"] = [
        {
            **dataclasses.asdict(stage),
            "calls": stage.calls and {**dataclasses.asdict(stage.calls), "mean": stage.calls.mean},
            "memory": {**dataclasses.asdict(stage.memory), "state": stage.memory.state, "total": stage.memory.total},
            "disk": {**dataclasses.asdict(stage.disk), "total": stage.disk.total},
            "roofline": stage.roofline and {**dataclasses.asdict(stage.roofline), "seconds": stage.roofline.seconds},
            "images": stage.images,
            "all_calls": stage.all_calls,
            "all_flops": stage.all_flops,
            "all_seconds": stage.all_seconds,
            **({"timed": dataclasses.asdict(timed[stage.name])} if timed else {}),
            **({"compiled": dataclasses.asdict(compiled[stage.name])} if compiled else {}),
        }
        for stage in plan.stages
    ]
    names = ("updates", "images", "all_calls", "all_flops", "all_seconds")
    found["total"] = {name: plan.total(name) for name in names} | {"disk": plan.disk, "memory": plan.memory}
    if timed:
        found["total"]["timed_seconds"] = sum(_timed_total(stage, timed) for stage in plan.stages)
    return found


def plan_lines(plan: Plan, timed: Mapping[str, Timed] | None, compiled: Mapping[str, Compiled] | None) -> list[str]:
    """Write a plan as tables of stages: work, memory of a device, disk, and what was measured or compiled."""
    device, mesh = plan.device, " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    lines = [
        f"plan of {plan.output_dir}: nothing is trained or written",
        f"model {plan.model}, {plan.resolution} px, latents {' x '.join(map(str, plan.latent_shape))}, {plan.dtype}",
        f"devices {device.count} x {device.kind}{'' if device.here else ' (not those here)'}, mesh {mesh}",
        "",
        *_work(plan),
        "",
        *_memory(plan),
        "",
        *_disk(plan),
    ]
    if timed:
        lines += ["", *_timed(plan, timed)]
    if compiled:
        lines += ["", *_compiled(plan, compiled)]
    return [*lines, *(["", *(f"note: {note}" for note in plan.notes)] if plan.notes else [])]


def _work(plan: Plan) -> list[str]:
    rows = [["stage", "kind", "updates", "batch", "calls", "images", "TFLOP", "at best", "in all"]]
    for stage in plan.stages:
        split = f" in {stage.accumulate}" if stage.accumulate > 1 else ""
        rows.append(
            [
                stage.name,
                stage.kind,
                f"{stage.updates:,}" + (f" ({stage.done:,} done)" if stage.done else ""),
                f"{stage.batch_size:,}{split}",
                _calls(stage),
                f"{stage.images:,}",
                UNKNOWN if stage.flops is None else _tera(stage.flops),
                _seconds(None if stage.roofline is None else stage.roofline.seconds),
                _seconds(stage.all_seconds),
            ]
        )
    rows.append(
        [
            "in all",
            "",
            f"{plan.total('updates'):,}",
            "",
            "",
            f"{plan.total('images'):,}",
            "",
            "",
            _seconds(plan.total("all_seconds")),
        ]
    )
    lines = _table(rows)
    lines.append(
        "calls: the denoiser's forward calls a sample and update; TFLOP: an update's matrix products and convolutions, "
        "gradients and the encoding of its batch included; at best: that work at the published peaks"
    )
    if (calls := plan.total("all_calls")) is not None and (flops := plan.total("all_flops")) is not None:
        lines.append(f"in all {calls:,.0f} calls, {_tera(flops)} TFLOP")
    return lines


def _calls(stage: StagePlan) -> str:
    if stage.calls is None:
        return UNKNOWN
    spread = "" if stage.calls.fewest == stage.calls.most else f" ({stage.calls.fewest:g}-{stage.calls.most:g})"
    return f"{stage.calls.mean:g}{spread}"


def _memory(plan: Plan) -> list[str]:
    names = [field.name for field in dataclasses.fields(plan.stages[0].memory)]
    rows = [["memory of a device", *names, "in all"]]
    for stage in plan.stages:
        parts = [getattr(stage.memory, name) for name in names]
        rows.append([stage.name, *(UNKNOWN if part is None else bytes_text(part) for part in parts)])
        rows[-1].append(bytes_text(stage.memory.total))
    peaks = plan.device.peaks
    of = "" if peaks is None else f", of {bytes_text(peaks.memory)} that a device has"
    return [*_table(rows), f"at least {bytes_text(plan.memory)}{of}; activations are not counted (--topology compiles)"]


def _disk(plan: Plan) -> list[str]:
    rows = [["disk", "checkpoint", "kept", "exported", "in all"]]
    for stage in plan.stages:
        disk = stage.disk
        sizes = [bytes_text(disk.checkpoint), str(disk.kept), bytes_text(disk.exported), bytes_text(disk.total)]
        rows.append([stage.name, *sizes])
    return _table([*rows, ["in all", "", "", "", bytes_text(plan.disk)]])


def _timed(plan: Plan, timed: Mapping[str, Timed]) -> list[str]:
    rows = [["measured here", "first update", "each after it", "all updates"]]
    for stage in plan.stages:
        found = timed[stage.name]
        rows.append([stage.name, *map(_seconds, (found.first, found.each, _timed_total(stage, timed)))])
    total = sum(_timed_total(stage, timed) for stage in plan.stages)
    count = next(iter(timed.values())).updates
    return [
        *_table([*rows, ["in all", "", "", _seconds(total)]]),
        f"the first update compiles; each: the mean of {count}; previews, checkpoints and the comparison come on top",
    ]


def _timed_total(stage: StagePlan, timed: Mapping[str, Timed]) -> float:
    return timed[stage.name].first + timed[stage.name].each * (stage.updates - 1)


def _compiled(plan: Plan, compiled: Mapping[str, Compiled]) -> list[str]:
    rows = [["compiled, a chip", "arguments", "temporary", "peak", "TFLOP", "accessed", "compiling"]]
    for stage in plan.stages:
        found = compiled[stage.name]
        rows.append(
            [
                stage.name,
                bytes_text(found.arguments),
                bytes_text(found.temporary),
                UNKNOWN if found.peak is None else bytes_text(found.peak),
                _tera(found.flops),
                bytes_text(found.accessed),
                _seconds(found.seconds),
            ]
        )
    return [*_table(rows), "TFLOP and accessed are the compiler's, of a micro-batch: a loop counts as one pass"]


def _tera(operations: float) -> str:
    return f"{operations / 1e12:,.0f}" if operations >= 1e14 else f"{operations / 1e12:.3g}"


def _seconds(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    for unit, seconds in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if value >= 2 * seconds or unit == "s":
            return f"{value / seconds:.3g} {unit}" if value >= 0.1 else f"{value * 1000:.3g} ms"
    raise AssertionError


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
