"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from hypersd_jax.evaluation.curves import stage_curves
from hypersd_jax.evaluation.feedback_curves import Names, feedback_section
from hypersd_jax.evaluation.grid import Sample
from hypersd_jax.evaluation.quality import Floor, Series, quality_section
from hypersd_jax.evaluation.tables import Table, is_number, number_text, table_cell, table_heading, table_keys

CURVES = {"loss": "Loss", "grad_norm": "Gradient norm", "update_norm": "Update norm", "lr": "Learning rate"}
# Beyond so many bytes an image is embedded as JPEG where that is smaller.
MOST_PNG = 1 << 20
SAMPLE_SIDE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The contents of a report, as plain data; an empty part is left out.

    Attributes:
        title: the heading of the page.
        made: when and with what, under the title.
        summary: paragraphs under that.
        details: settings and measurements of the run as a whole.
        command: what started the run.
        rows: the rows of results.json. ``KEY_se`` is shown behind ``KEY`` as its standard error.
        notes: what the reader must know about the columns of the table.
        tables: further tables below that.
        quality: rows that are plotted against steps and calls, and the level that they are read against.
        metrics: the records of metrics.jsonl.
        feedback: names of what guards measured, by stage and key of ``metrics``.
        grids: caption -> image.
        prompts: those of the grids' rows, from above, for who cannot read them in the image.
        strips: caption -> samples with their prompts.
    """

    title: str
    made: str = ""
    summary: Sequence[str] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    command: str = ""
    rows: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    quality: tuple[Sequence[Series], Floor | None] = ((), None)
    metrics: Sequence[Mapping[str, Any]] = ()
    feedback: Mapping[str, Names] = dataclasses.field(default_factory=dict)
    grids: Mapping[str, Image.Image] = dataclasses.field(default_factory=dict)
    prompts: Sequence[str] = ()
    strips: Mapping[str, Sequence[Sample]] = dataclasses.field(default_factory=dict)


def write_report(report: Report, path: Path) -> None:
    """Write the page, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    # A caption may hold half of a pair of surrogates, which has no place in a file.
    temporary.write_text(render(report), encoding="utf-8", errors="replace")
    temporary.replace(path)


def render(report: Report) -> str:
    """The page: style, curves and images are inside it, and it asks the network for nothing."""
    style = resources.files("hypersd_jax.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    grids = "".join(_grid(*item) for item in report.grids.items())
    parts = [
        _header(report),
        _section("Results", _table(report.rows) + _paragraphs(report.notes, "note")) if report.rows else "",
        *(_section(each.heading, _table(each.rows) + _paragraphs(each.notes, "note")) for each in report.tables),
        _section("Quality against cost", quality_section(*report.quality)),
        _section("Images", grids + _prompts(report.prompts)) if grids else "",
        _section("Samples", "".join(_strip(*item) for item in report.strips.items())),
        _section("Feedback", feedback_section(report.metrics, report.feedback)),
        _section("Training", _training(report.metrics)),
        _section("Run", _command(report.command) + _details({**report.details, **_protocols(report.rows)})),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(report.title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def _header(report: Report) -> str:
    made = _paragraphs([report.made] if report.made else [], "note")
    return f"<header>\n<h1>{_text(report.title)}</h1>\n{made}{_paragraphs(report.summary, 'summary')}</header>\n"


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{body}</section>\n" if body else ""


def _paragraphs(texts: Sequence[str], kind: str) -> str:
    return "".join(f'<p class="{kind}">{_text(text)}</p>\n' for text in texts)


def _text(text: str) -> str:
    """Safe inside an element: escaped, and without control codes, which HTML forbids."""
    return html.escape("".join(letter for letter in text if letter.isspace() or (letter >= " " and letter != "\x7f")))


def _prompt(text: str) -> str:
    """A prompt in its own direction of reading, which changes none beside it."""
    return f"<bdi>{_text(text)}</bdi>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = table_keys(rows)
    numeric = {key: any(is_number(row.get(key)) for row in rows) for key in keys}
    head = "".join(f"<th{_align(numeric[key])}>{_text(table_heading(key))}</th>" for key in keys)
    body = []
    for row in rows:
        cells = "".join(f"<td{_align(numeric[key])}>{_cell(row, key)}</td>" for key in keys)
        body.append(f"<tr>{cells}</tr>\n")
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>"
    return f'<div class="scroll" tabindex="0">{table}</div>\n'


def _align(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _cell(row: Mapping[str, Any], key: str) -> str:
    value, plus, error = table_cell(row, key).partition(" ± ")
    return _text(value) + (f'<span class="error">{_text(plus + error)}</span>' if plus else "")


def _training(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The loss of each stage, and what else is logged folded away."""
    loss, *others = ({name: stage_curves(metrics, key)} for key, name in CURVES.items())
    folded = "".join(
        f"<details>\n<summary>{name}</summary>\n{_charts(name, panels)}</details>\n"
        for each in others
        for name, panels in each.items()
        if panels
    )
    return "".join(_charts(name, panels) for name, panels in loss.items() if panels) + folded


def _charts(title: str, panels: Mapping[str, str]) -> str:
    figures = "".join(
        f"<figure>\n<figcaption>{title}: {_text(stage)}</figcaption>\n{svg}\n</figure>\n"
        for stage, svg in panels.items()
    )
    return f'<div class="charts">\n{figures}</div>\n'


def _grid(caption: str, grid: Image.Image) -> str:
    text = _text(caption)
    # Where it would shrink beyond reading, on a phone, it is scrolled.
    least = grid.width * 3 // 4
    image = _image(grid, text, f' style="min-width: {least}px"')
    return (
        f'<figure class="grid">\n<figcaption>{text}</figcaption>\n<div class="scroll" tabindex="0">{image}</div>\n'
        "</figure>\n"
    )


def _prompts(prompts: Sequence[str]) -> str:
    if not prompts:
        return ""
    items = "".join(f"<li>{_prompt(prompt)}</li>\n" for prompt in prompts)
    return f"<details>\n<summary>The prompts of the rows</summary>\n<ol>\n{items}</ol>\n</details>\n"


def _strip(caption: str, samples: Sequence[Sample]) -> str:
    figures = []
    for prompt, image in samples:
        shown = image.copy()
        if prompt:
            shown.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE), Image.Resampling.LANCZOS)
        figures.append(
            f"<figure>\n{_image(shown, _text(prompt) or _text(caption))}\n"
            f'<figcaption title="{_text(prompt)}">{_prompt(prompt)}</figcaption>\n</figure>\n'
        )
    kind = "samples" if any(prompt for prompt, _ in samples) else "whole"
    return f'<h3>{_text(caption)}</h3>\n<div class="{kind}">\n{"".join(figures)}</div>\n'


def _image(image: Image.Image, text: str, more: str = "") -> str:
    written = io.BytesIO()
    image.save(written, format="PNG", optimize=True)
    content, kind = written.getvalue(), "png"
    if len(content) > MOST_PNG:
        smaller = io.BytesIO()
        image.convert("RGB").save(smaller, format="JPEG", quality=90, subsampling=0)
        if len(smaller.getvalue()) < len(content):
            content, kind = smaller.getvalue(), "jpeg"
    data = base64.b64encode(content).decode("ascii")
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img alt="{text}" {size}{more} src="data:image/{kind};base64,{data}">'


def _command(command: str) -> str:
    return f'<pre tabindex="0">{_text(command)}</pre>\n' if command else ""


def _protocols(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Collect what the rows were measured by, which the table has no column for."""
    names = dict.fromkeys(str(row["protocol"]) for row in rows if "protocol" in row)
    return {"protocol": ", ".join(names)} if names else {}


def _details(details: Mapping[str, Any]) -> str:
    entries = "".join(
        f"<div><dt>{_text(str(name))}</dt><dd>{_text(number_text(value, None))}</dd></div>\n"
        for name, value in details.items()
    )
    return f"<dl>\n{entries}</dl>\n" if details else ""
