"""Means and spreads over seeds, and which margins count."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hypersd_jax.evaluation import COLUMNS

Row = dict[str, Any]
METRICS = {key: -1 if COLUMNS[key].better == "higher" else 1 for key in ("distance", "kid", "kid_train", "clip_gain")}
"""What margins are taken of: 1 where less is better, -1 where more is."""

KEYS = ("method", "recipe", "stage", "steps", "sampler", "eta", "timesteps", "updates")
"""What a row is of."""

COUNTS = 2.0
"""A margin counts from this many pooled standard deviations on."""


def summarise(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row for each method and number of steps: mean and standard deviation over the seeds of each metric.

    Args:
        results: {"method", "recipe", "stage", "steps", "seed", "updates", and the metrics} of each run.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        key = tuple(result[name] for name in KEYS)
        groups.setdefault(key, []).append(result)
    rows = []
    for key, found in groups.items():
        row: Row = {**dict(zip(KEYS, key, strict=True)), "seeds": len(found)}
        for metric in (*METRICS, "fid_teacher"):
            values = [float(result[metric]) for result in found]
            row[metric] = statistics.fmean(values)
            row[f"{metric}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return sorted(rows, key=lambda row: -row["steps"])


def margins(rows: Sequence[Row], against: str) -> list[Row]:
    """For each other method's row the margin of ``against`` at the same number of steps, and whether it counts.

    The margin is the other's mean less that of ``against``, so that a positive one is in favour of ``against``. Where
    a method has several rows at a number of steps, each is compared with the nearest of ``against``.
    """
    found = []
    for other in rows:
        own = [row for row in rows if row["method"] == against and row["steps"] == other["steps"]]
        if other["method"] == against or not own:
            continue
        for metric in METRICS:
            sign = METRICS[metric]
            mine = min(own, key=lambda row: sign * row[metric])
            margin, pooled = sign * (other[metric] - mine[metric]), pooled_deviation(mine, other, metric)
            names = {"against": against, "other": _title(other), "steps": other["steps"], "metric": metric}
            found.append({**names, "margin": margin, "pooled_sd": pooled, "verdict": verdict(margin, pooled)})
    return found


def pooled_deviation(a: Row, b: Row, metric: str) -> float | None:
    """sqrt(((n_a - 1) s_a^2 + (n_b - 1) s_b^2) / (n_a + n_b - 2)); None where a row has one seed."""
    if a[f"{metric}_sd"] is None or b[f"{metric}_sd"] is None:
        return None
    degrees = [(row["seeds"] - 1, row[f"{metric}_sd"]) for row in (a, b)]
    return math.sqrt(sum(n * s**2 for n, s in degrees) / sum(n for n, _ in degrees))


def verdict(margin: float, pooled: float | None) -> str:
    """Better, worse or not shown: whether the margin is over two pooled standard deviations, and which way."""
    if pooled is None:
        return "one seed"
    if abs(margin) <= COUNTS * pooled:
        return "not shown"
    return "better" if margin > 0 else "worse"


def markdown(
    title: str, details: Sequence[str], rows: Sequence[Row], margins: Sequence[Row], teachers: list[Row], goal: Row
) -> str:
    """The page: rows by steps, the teacher for scale (``goal``: at many steps), and the margins."""
    lines = [f"# {title}", "", *details, ""]
    lines += [
        "| steps | method | student | sampler | updates | distance | KID | FID | KID to training images "
        "| text-match gain | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sampler = sampler_title(row)
        lines.append(
            f"| {row['steps']} | {row['method']} | {row['recipe']} / {row['stage']} | {sampler} | {row['updates']} "
            f"| {_spread(row, 'distance', 4)} | {_spread(row, 'kid', 3)} | {_spread(row, 'fid_teacher', 0)} "
            f"| {_spread(row, 'kid_train', 3)} | {_spread(row, 'clip_gain', 1)} | {row['seeds']} |"
        )
    lines.append(
        f"| {goal['steps']} | teacher | | ddim | | 0 | | | {goal['kid_train']:.3f} | {goal['clip_gain']:.1f} | |"
    )
    for row in teachers:
        guidance = f"guidance {row['guidance']:g}" if row["guidance"] > 1 else "no guidance"
        lines.append(
            f"| {row['steps']} | {row['method']}, {guidance} | | ddim | | {row['distance']:.4f} | {row['kid']:.3f} "
            f"| {row['fid_teacher']:.0f} | {row['kid_train']:.3f} | {row['clip_gain']:.1f} | |"
        )
    lines += ["", "Mean ± standard deviation over seeds. Distance: root mean squared pixel difference (0..1) to the"]
    lines += ["teacher's 25-step image from the same latents. KID, FID: against the teacher's 25-step images,"]
    lines += ["and KID against as many training images. Text-match gain: over that of shuffled prompts."]
    if margins:
        lines += ["", f"Margins of {margins[0]['against']} (positive: nearer to the teacher). One counts if it is over"]
        lines += ["two pooled standard deviations; else it is not shown.", ""]
        lines += ["| steps | over | metric | margin | pooled sd | verdict |", "|---|---|---|---|---|---|"]
    for row in margins:
        pooled = "" if row["pooled_sd"] is None else f"{row['pooled_sd']:.4f}"
        cells = (row["steps"], row["other"], row["metric"], f"{row['margin']:+.4f}", pooled, row["verdict"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def sampler_title(row: Mapping[str, Any]) -> str:
    """A row's sampler, with its eta and its own timesteps where it has them."""
    eta = f", eta {row['eta']:g}" if row["eta"] else ""
    return row["sampler"] + eta + (f" from {row['timesteps'][0]}" if row["timesteps"] else "")


def _title(row: Row) -> str:
    return f"{row['method']} ({sampler_title(row)})"


def _spread(row: Row, metric: str, digits: int) -> str:
    deviation = row[f"{metric}_sd"]
    return f"{row[metric]:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
