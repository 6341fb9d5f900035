"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from hypersd_jax.evaluation.curves import curve

# Key of a results row -> (heading, digits after the point). Other keys are shown under their own name.
HEADINGS: dict[str, tuple[str, int]] = {
    "model": ("Model", 0),
    "steps": ("Steps", 0),
    "guidance": ("Guidance", 1),
    "calls": ("Calls", 0),
    "distance": ("Distance to teacher\N{NO-BREAK SPACE}↓", 3),
    "feature_distance": ("Feature distance to teacher\N{NO-BREAK SPACE}↓", 2),
    "margin": ("Margin\N{NO-BREAK SPACE}↑", 4),
    "kid": ("KID\N{NO-BREAK SPACE}↓", 3),
    "kid_margin": ("Margin in KID\N{NO-BREAK SPACE}↑", 3),
    "clip_gain": ("Gain in text match\N{NO-BREAK SPACE}↑", 2),
    "fid_train": ("FID to training pictures\N{NO-BREAK SPACE}↓", 1),
    "fid_teacher": ("FID to teacher\N{NO-BREAK SPACE}↓", 1),
    "kid_train": ("KID to training pictures\N{NO-BREAK SPACE}↓", 3),
    "clip": ("Text match\N{NO-BREAK SPACE}↑", 2),
    "clip_shuffled": ("Text match, shuffled prompts", 2),
    "clip_real": ("CLIP score\N{NO-BREAK SPACE}↑", 2),
    "clip_real_shuffled": ("CLIP score, shuffled prompts", 2),
    "clip_real_gain": ("Gain in CLIP score\N{NO-BREAK SPACE}↑", 2),
    "diversity": ("Diversity\N{NO-BREAK SPACE}↑", 2),
    "seconds_per_image": ("Seconds per picture\N{NO-BREAK SPACE}↓", 3),
    "rival": ("Nearest teacher", 0),
    "sampler": ("Sampler", 0),
    "n": ("Pictures", 0),
}
ERROR_SUFFIX = "_se"
CURVES = {"loss": "Loss", "grad_norm": "Gradient norm", "update_norm": "Update norm", "lr": "Learning rate"}
MISSING = "\N{EN DASH}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a report shows, as plain data; an empty part is left out.

    Attributes:
        title: the heading of the page.
        summary: paragraphs under the title.
        facts: settings and measurements of the run as a whole.
        rows: the rows of results.json. ``KEY_se`` is shown behind ``KEY`` as its standard error.
        notes: what the reader must know about the columns of the table.
        metrics: the records of metrics.jsonl.
        grids: caption -> picture.
    """

    title: str
    summary: Sequence[str] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    grids: Mapping[str, Image.Image] = dataclasses.field(default_factory=dict)


def write_report(report: Report, path: Path) -> None:
    """Write the page, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(report), encoding="utf-8")
    temporary.replace(path)


def render(report: Report) -> str:
    """The page: style, curves and pictures are inside it, and it asks the network for nothing."""
    style = resources.files("hypersd_jax.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    curves = {title: curve(report.metrics, key) for key, title in CURVES.items()}
    parts = [
        _header(report.title, report.summary),
        _section("Results", _table(report.rows) + _paragraphs(report.notes, "note")) if report.rows else "",
        _section("Pictures", "".join(_figure(*item) for item in report.grids.items())) if report.grids else "",
        _section("Training", _charts({title: svg for title, svg in curves.items() if svg})),
        _section("Run", _facts(report.facts)) if report.facts else "",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(report.title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def _header(title: str, summary: Sequence[str]) -> str:
    return f"<header>\n<h1>{html.escape(title)}</h1>\n{_paragraphs(summary, 'summary')}</header>\n"


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{body}</section>\n" if body else ""


def _paragraphs(texts: Sequence[str], kind: str) -> str:
    return "".join(f'<p class="{kind}">{html.escape(text)}</p>\n' for text in texts)


def table_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns: the known ones in their order, then the rest; standard errors have none of their own."""
    present = dict.fromkeys(key for row in rows for key in row)
    errors = {key for key in present if key.endswith(ERROR_SUFFIX) and key.removesuffix(ERROR_SUFFIX) in present}
    known = [key for key in HEADINGS if key in present]
    return known + [key for key in present if key not in known and key not in errors]


def table_heading(key: str) -> str:
    """What stands above a column."""
    return HEADINGS[key][0] if key in HEADINGS else key.replace("_", " ")


def table_cell(row: Mapping[str, Any], key: str) -> str:
    """A value with its standard error, as plain text."""
    digits = HEADINGS[key][1] if key in HEADINGS else None
    text, error = _number(row.get(key), digits), row.get(key + ERROR_SUFFIX)
    return f"{text} ± {_number(error, digits)}" if _is_number(error) else text


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = table_keys(rows)
    numeric = {key: any(_is_number(row.get(key)) for row in rows) for key in keys}
    head = "".join(f"<th{_align(numeric[key])}>{html.escape(table_heading(key))}</th>" for key in keys)
    body = []
    for row in rows:
        cells = "".join(f"<td{_align(numeric[key])}>{_cell(row, key)}</td>" for key in keys)
        body.append(f"<tr>{cells}</tr>\n")
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>"
    return f'<div class="scroll">{table}</div>\n'


def _align(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _cell(row: Mapping[str, Any], key: str) -> str:
    value, plus, error = table_cell(row, key).partition(" ± ")
    return html.escape(value) + (f'<span class="error">{html.escape(plus + error)}</span>' if plus else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, digits: int | None) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, float):
        return f"{value:.4g}" if digits is None else f"{value:,.{digits}f}"
    return f"{value:,}" if _is_number(value) else str(value)


def _charts(charts: Mapping[str, str]) -> str:
    figures = (f"<figure>\n<figcaption>{title}</figcaption>\n{svg}\n</figure>\n" for title, svg in charts.items())
    joined = "".join(figures)
    return f'<div class="charts">\n{joined}</div>\n' if joined else ""


def _figure(caption: str, picture: Image.Image) -> str:
    written = io.BytesIO()
    picture.save(written, format="PNG", optimize=True)
    data = base64.b64encode(written.getvalue()).decode("ascii")
    text = html.escape(caption)
    image = f'<img alt="{text}" width="{picture.width}" height="{picture.height}" src="data:image/png;base64,{data}">'
    return f'<figure class="grid">\n<figcaption>{text}</figcaption>\n{image}\n</figure>\n'


def _facts(facts: Mapping[str, Any]) -> str:
    entries = "".join(
        f"<div><dt>{html.escape(str(name))}</dt><dd>{html.escape(_number(value, None))}</dd></div>\n"
        for name, value in facts.items()
    )
    return f"<dl>\n{entries}</dl>\n"
