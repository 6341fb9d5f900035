from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import Report, read_metrics, write_report
from hypersd_jax.evaluation.curves import curve
from hypersd_jax.evaluation.report import render

ROWS = [
    {"model": "teacher", "steps": 25, "fid_train": 41.23, "kid": 0.012, "kid_se": 0.002, "distance": None},
    {
        "model": "student <8>",
        "steps": 8,
        "fid_train": 43.5,
        "kid": 0.013,
        "kid_se": 0.003,
        "distance": 0.1,
        "own_key": 7,
    },
]


def metrics() -> list[dict[str, object]]:
    return [
        {"stage": stage, "step": step, "loss": 0.1 / step, "grad_norm": None if step == 3 else 1.0}
        for stage in ("tscd-8", "tscd-4")
        for step in range(1, 40)
    ]


def report(**changes: object) -> Report:
    parts = {
        "title": "A run & its results",
        "summary": ["Two students."],
        "facts": {"seed": 0, "devices": "8 TPU cores", "updates": 12000},
        "rows": ROWS,
        "notes": ["FID (EfficientNet-Lite0)."],
        "metrics": metrics(),
        "grids": {"Held-out prompts": Image.new("RGB", (40, 30), (255, 0, 0))},
    }
    return Report(**{**parts, **changes})  # type: ignore[arg-type]


class Balance(html.parser.HTMLParser):
    """Every element is closed in order."""

    void = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_well_formed_file_that_asks_for_nothing(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|<link|<script|@import", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))


def test_every_row_and_value_is_shown() -> None:
    page = render(report())
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    assert body.count("<tr>") == len(ROWS)
    assert "student &lt;8&gt;" in body
    assert '0.012<span class="error"> ± 0.002</span>' in body
    assert "43.5" in body
    assert "\N{EN DASH}" in body  # the missing distance
    assert "own key</th>" in page
    assert "kid se" not in page
    for text in ("A run &amp; its results", "8 TPU cores", "12,000", "FID (EfficientNet-Lite0).", "Held-out prompts"):
        assert text in page


def test_parts_without_content_are_left_out() -> None:
    page = render(report(rows=(), metrics=(), grids={}, facts={}))
    assert "<section>" not in page


def test_curves_show_each_stage_and_skip_what_is_missing() -> None:
    svg = curve(metrics(), "loss")
    assert svg is not None
    assert svg.startswith("<svg ")
    assert ">tscd-8<" in svg
    assert ">tscd-4<" in svg
    assert "currentColor" in svg
    assert curve(metrics(), "grad_norm") is not None
    assert curve(metrics(), "absent") is None
    assert svg == curve(metrics(), "loss")


def test_metrics_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in metrics()), encoding="utf-8")
    assert read_metrics(path) == metrics()
    path.write_text('{"stage": "a", "step": 1}\n[1]\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2"):
        read_metrics(path)
