"""The files of an evaluation: results.json, results.md, grid.png and report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypersd_jax.evaluation import Report, Series, load_card, picture_grid, write_markdown, write_report
from hypersd_jax.stages.evaluate_drawing import Model
from hypersd_jax.stages.evaluate_rows import Row
from hypersd_jax.stages.provenance import device_line, duration, made_line
from hypersd_jax.stages.result_files import write_picture, write_rows

TITLE = "Evaluation"
GRID_ROWS = 12
NOTES = (
    "FID and KID: EfficientNet-Lite0 features; comparable with no Inception figure. Real pictures against others, as "
    "many, are their floor.",
    "Text match: cosine times 100 by the scorer that ships for reporting, which is no CLIP. With shuffled prompts it "
    "is what chance gives; the gain is what lies above that.",
    "Distance, and feature distance: to the reference's picture of the same prompt from the same latents, as a root "
    "mean squared pixel difference (0..1) and in features. Diversity: mean distance in features between pictures of "
    "one prompt from different seeds.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an evaluation comes from: what was typed, the seconds that it took, and the seeds of its samples."""

    command: str
    seconds: float
    seeds: Sequence[int]


def write_results(
    folder: Path,
    rows: Sequence[Row],
    columns: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    model: Model,
    origin: Origin,
) -> None:
    """Write all four, each at once or not at all; ``columns`` are title -> pictures (N, H, W, 3) of the N prompts."""
    write_rows(folder / "results.json", rows)
    write_markdown(folder / "results.md", TITLE, rows, NOTES)
    shown = {title: images[:GRID_ROWS] for title, images in columns.items()}
    grid = picture_grid(shown, prompts[:GRID_ROWS])
    write_picture(folder / "grid.png", grid)
    report = Report(
        title=TITLE,
        made=made_line(),
        summary=[_summary(rows[-1])],
        facts=_facts(model, origin),
        command=origin.command,
        rows=rows,
        notes=NOTES,
        quality=([Series(name=row["model"], rows=(row,)) for row in rows if "steps" in row], None),
        prompts=prompts[:GRID_ROWS],
        grids={"The same latents along each row, except the real picture's": grid},
    )
    write_report(report, folder / "report.html")


def _summary(row: Mapping[str, Any]) -> str:
    parts = [f"{row['model']}: {row['n']} pictures at {row['steps']} steps, guidance {row['guidance']:g}"]
    if "clip_gain" in row:
        parts.append(f"their text match is {row['clip_gain']:.2f} ± {row['clip_gain_se']:.2f} above chance")
    if row.get("distance"):
        parts.append(f"they lie {row['distance']:.4f} ± {row['distance_se']:.4f} from the reference's")
    return "; ".join(parts) + "."


def _facts(model: Model, origin: Origin) -> dict[str, Any]:
    card = load_card("report")
    settings = {key: value for key, value in dataclasses.asdict(model.settings).items() if value is not None}
    return {
        **settings,
        "weights": model.identity[:16],
        "devices": device_line(),
        "jax": jax.__version__,
        "seeds of the samples": f"{min(origin.seeds)} to {max(origin.seeds)}",
        "time": f"{duration(origin.seconds)}; what the cache held was not generated again",
        "reporting scorer": f"R@1 {card['unseen_styles']['r1']:.2f}, AUC {card['unseen_styles']['auc']:.3f}",
    }
