"""The tables of the comparison: what each arm changed, in the reward and in its judges, with standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.feedback.measuring import JUDGES, REWARD, SETS, Found
from hypersd_jax.evaluation.metrics import mean_estimate, units_of

CLEARLY = 0.2
"""An image is clearly worse when it falls by so much of the judge's standard deviation over the prompts."""
DIGITS = {"kid": 3, "recall": 3, "diversity": 2}
HEADINGS = {
    REWARD: "trained reward",
    "report": "judge: text match",
    "pixels": "judge: pixels",
    "truth": "judge: distance to the real image",
    "kid": "KID",
    "recall": "recall",
    "diversity": "diversity",
}


def summarise(before: Sequence[Found], after: Sequence[Found], prompts: Sequence[str]) -> dict[str, Any]:
    """Compare an arm's students with those that they started from, one of each for each seed.

    Every score has its mean, and the mean change with its standard error over ``prompts``, which may occur several times
    and whose change is that of all seeds; of sets the mean over the seeds, and that of the changes with its standard error where there are several.
    """
    row: dict[str, Any] = {}
    changes = {}
    for key in (REWARD, *JUDGES):
        old, new = (np.stack([each.scores[key] for each in found]) for found in (before, after))
        changes[key] = (new - old) / old.std()
        change = (new - old).mean(axis=0)
        row[key] = float(new.mean())
        row[f"{key}_change"], row[f"{key}_change_se"] = mean_estimate(change, units_of(prompts))
        row[f"{key}_by_seed"] = [float(value) for value in (new - old).mean(axis=1)]
    for key in SETS:
        if any(key not in each.sets for each in (*before, *after)):
            continue
        old, new = (np.asarray([each.sets[key] for each in found]) for found in (before, after))
        row[key], row[f"{key}_before"] = float(new.mean()), float(old.mean())
        row[f"{key}_by_seed"] = [float(value) for value in new - old]
    judged = np.stack([changes[key] for key in JUDGES])
    row["all_judges_lower"] = float(np.mean(np.all(judged < 0, axis=0)))
    row["joint_collapse"] = float(np.mean(np.all(judged < -CLEARLY, axis=0)))
    return row


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay the rows out, one table for each number of steps."""
    parts = []
    for steps in sorted({row["steps"] for row in rows}):
        heads = ["", *HEADINGS.values(), "all judges clearly lower", "calls", "updates"]
        parts.append(
            f"\n## {steps} step{'s' if steps > 1 else ''}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
        )
        for row in (each for each in rows if each["steps"] == steps):
            cells = [row["title"]]
            for key in (REWARD, *JUDGES):
                cell = f"{row[key]:.2f}"
                if f"{key}_change" in row:
                    cell += f" ({row[f'{key}_change']:+.2f} ± {row[f'{key}_change_se']:.2f})"
                cells.append(cell)
            cells += [
                f"{row[key]:.3f}" if key != "diversity" else f"{row[key]:.2f}" if key in row else "" for key in SETS
            ]
            cells.append(f"{row['joint_collapse']:.1%}" if "joint_collapse" in row else "")
            cells += [str(row.get("calls", "")), ", ".join(str(count) for count in row.get("made", ()))]
            parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)
