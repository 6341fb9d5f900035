"""The words and curves of a comparison's page."""

from __future__ import annotations

from collections.abc import Sequence

from hypersd_jax.evaluation.comparison import SETS_LEAST
from hypersd_jax.evaluation.evaluator import Row
from hypersd_jax.evaluation.quality import Floor, Series
from hypersd_jax.evaluation.reference import OTHER_LATENTS, TEACHER
from hypersd_jax.evaluation.tables import steps_text


def quality_series(rows: Sequence[Row]) -> tuple[list[Series], Floor | None]:
    """The teacher's rows by guidance, and the students': stages of one row each on one line, others each on its own."""
    teachers: dict[float, list[Row]] = {}
    students: dict[str, list[Row]] = {}
    for row in rows:
        if row["model"] == TEACHER:
            teachers.setdefault(row["guidance"], []).append(row)
        elif row["model"] != OTHER_LATENTS:
            students.setdefault(row["model"], []).append(row)
    series = [
        Series(name=f"teacher, guidance {scale:g}" if scale > 1 else "teacher, no guidance", rows=tuple(found))
        for scale, found in teachers.items()
    ]
    single = {name: found[0] for name, found in students.items() if len(found) == 1}
    if single:
        series.append(Series(name=f"students: {', '.join(single)}", rows=tuple(single.values())))
    series += [Series(name=name, rows=tuple(found)) for name, found in students.items() if len(found) > 1]
    floors = [row for row in rows if row["model"] == OTHER_LATENTS]
    if not floors:
        return series, None
    name = f"{steps_text(floors[0]['steps'])} of the teacher from other latents"
    return series, Floor(name=name, row=floors[0])


def margin_lines(rows: Sequence[Row]) -> list[str]:
    """Each student's margin over the teacher, as a sentence."""
    lines = []
    many = rows[0]["steps"]
    for row in rows:
        if "margin" in row:
            side = "nearer to" if row["margin"] >= 0 else "farther from"
            lines.append(
                f"{row['model']}: {steps_text(row['steps'])}, {abs(row['margin']):.4f} ± {row['margin_se']:.4f} {side} "
                f"the teacher's {many}-step images than the teacher itself at as many UNet calls ({row['baseline']})."
                + (" That is within twice its error." if abs(row["margin"]) < 2 * row["margin_se"] else "")
            )
    return lines


def own_notes(rows: Sequence[Row]) -> list[str]:
    """Notes on the table of a dataset of one's own, and why it does not say more."""
    count = rows[0]["n"]
    notes = [
        f"The comparison is on {count} samples of the dataset's first captions. They are captions that training saw, "
        "and few: what lies within twice a standard error may be chance. Samples of one caption are alike, so that "
        "the errors are those of a mean over captions.",
    ]
    if any(row["model"] == OTHER_LATENTS for row in rows):
        notes.append("The row from other latents: how far the teacher's samples of one caption are from one another.")
    if "kid" not in rows[-1]:
        notes.append(
            f"FID and KID are left out: of {count} samples they would say nothing. evaluation.samples={SETS_LEAST} or "
            "more gives them."
        )
    if "clip" not in rows[0]:
        notes.append(
            "Text match is left out: the scorer that ships knows the words of the embedded captions alone, and cannot "
            "tell apart those of this list. `hypersd evaluate --clip` measures with a real CLIP."
        )
    if "diversity" in rows[0]:
        notes.append("Diversity is that of the seeds which a caption has in this list; captions with one say nothing.")
    else:
        notes.append("Diversity is left out: each caption has one seed. More evaluation.samples give it.")
    return notes
