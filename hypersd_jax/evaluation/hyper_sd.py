"""The protocol of the Hyper-SD paper (arXiv 2404.13686, Sec. 4): its models, and our rows beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.evaluator import Row
from hypersd_jax.evaluation.paper import CITATION, FAMILIES, Family
from hypersd_jax.evaluation.reported_rewards import reward_key
from hypersd_jax.evaluation.tables import ERROR_SUFFIX, Table
from hypersd_jax.pipeline import Pipeline

PROMPTS = 5000
"""Prompts of the paper's COCO-5k."""

UNITS = {
    "clip_score": ("clip_real", 1.0),
    "aesthetic_score": (reward_key("aesthetic"), 1.0),
    "image_reward": (reward_key("imagereward"), 1.0),
    "pickscore_100": (reward_key("pickscore"), 0.01),
}
"""The paper's columns: key of ours, and what that is multiplied by to be in the paper's unit."""

DIFFERENCES = (
    "What may differ from the paper: it states neither its seeds, nor the eta of rows of several steps, nor how many "
    "images a prompt has, nor which caption of an image it reads. Here prompt i has one image, from seed i, and eta is "
    "the sampler's or --eta. The paper's CLIP is ViT-B/32; here the weights are those of --clip and --reward."
)


def require_family(pipe: Pipeline) -> Family:
    """Return the rows that a model is read against.

    Raises:
        UserError: the paper has none of its family, or its images are of another size.
    """
    family = FAMILIES.get(pipe.base.kohya_family)
    if family is None:
        raise UserError(f"--protocol hyper-sd: {pipe.base.source} is neither SD 1.5 nor SDXL, which the paper measures")
    height, width = pipe.native_size
    if (height, width) != (family.side, family.side):
        raise UserError(
            f"--protocol hyper-sd: the paper measures {family.name} at {family.side} x {family.side} pixels, but "
            f"images of {pipe.base.source} are {width} x {height}"
        )
    return family


def paper_table(family: Family, rows: Sequence[Row]) -> Table:
    """Make the table of the paper's rows and, below them, of our own that have the paper's columns, in its units."""
    table: list[Row] = [
        {
            "model": each.model,
            "source": "paper",
            "type": each.type,
            "steps": each.steps,
            **dict(zip(UNITS, (each.clip, each.aesthetic, each.image_reward, each.pickscore), strict=True)),
        }
        for each in family.rows
    ]
    own = [row for row in rows if any(key in row for key, _ in UNITS.values())]
    table += [{"model": row["model"], "source": "here", "steps": row.get("steps"), **_in_units(row)} for row in own]
    notes = [f"{CITATION}: {family.name}, COCO-5k, {family.side} px. {DIFFERENCES}"]
    if own and own[-1]["n"] != PROMPTS:
        notes.append(f"Here on {own[-1]['n']:,} prompts, not on the paper's {PROMPTS:,}.")
    return Table(heading="Beside the paper's results", rows=table, notes=notes)


def _in_units(row: Mapping[str, Any]) -> Row:
    """The paper's columns of one of our rows, with standard errors; what the row lacks is left out."""
    found: Row = {}
    for key, (own, factor) in UNITS.items():
        for end in ("", ERROR_SUFFIX):
            if own + end in row:
                found[key + end] = factor * row[own + end]
    return found
