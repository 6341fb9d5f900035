from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import Report, read_metrics, write_report
from hypersd_jax.evaluation.curves import stage_curves, training_seconds
from hypersd_jax.evaluation.grid import Sample
from hypersd_jax.evaluation.quality import Floor, Series
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
        "details": {"seed": 0, "devices": "8 TPU cores", "updates": 12000},
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
    page = render(report(rows=(), metrics=(), grids={}, details={}))
    assert "<section>" not in page


def test_curves_have_a_panel_a_stage_and_skip_what_is_missing() -> None:
    panels = stage_curves(metrics(), "loss")
    assert list(panels) == ["tscd-8", "tscd-4"]
    for svg in panels.values():
        assert svg.startswith("<svg ")
        assert "currentColor" in svg
    assert list(stage_curves(metrics(), "grad_norm")) == ["tscd-8", "tscd-4"]
    assert stage_curves(metrics(), "absent") == {}
    assert panels == stage_curves(metrics(), "loss")
    page = render(report())
    assert "Loss: tscd-8</figcaption>" in page
    assert page.count("<svg") == 2 * 2  # loss and gradient norm of two stages


def test_names_that_matplotlib_would_read_as_mathematics() -> None:
    """They stand in the page, not in the plot; and every name of a part of a plot is there once."""
    names = ("_a$b$_<i>", "\N{CJK UNIFIED IDEOGRAPH-732B}")
    records = [{"stage": name, "step": step, "loss": 0.1 * step} for name in names for step in (1, 2, 3)]
    series = [Series(name=name, rows=tuple(ROWS)) for name in names]
    page = render(report(metrics=records, quality=(series, None), rows=[]))
    assert "Loss: _a$b$_&lt;i&gt;</figcaption>" in page
    assert "<bdi>_a$b$_&lt;i&gt;</bdi>" in page
    assert "<i>" not in page
    defined = re.findall(r' id="([^"]+)"', page)
    assert len(defined) == len(set(defined))


def test_quality_is_plotted_against_steps_and_calls() -> None:
    rows = [
        {"model": "teacher", "steps": steps, "calls": 2 * steps, "distance": 1 / steps, "distance_se": 0.01}
        for steps in (25, 8)
    ]
    quality = ([Series(name="teacher", rows=tuple(rows))], Floor(name="other latents", row={"distance": 0.2}))
    page = render(report(metrics=(), rows=(), quality=quality))
    assert page.count("<svg") == 2
    assert "against sampling steps; lower is better; dashed: other latents, 0.2" in page
    assert "against UNet calls an image" in page
    for number in ("8", "25", "16", "50"):
        assert f">{number}</text>" in page
    far = (quality[0], Floor(name="other latents", row={"distance": 9.0}))
    assert "dashed" not in render(report(metrics=(), rows=(), quality=far))
    assert "Quality" not in render(report(quality=([Series(name="one", rows=(rows[0],))], None)))


def test_prompts_of_all_kinds_are_text() -> None:
    prompts = ["<script>alert(1)</script>", 'a "quoted" & $5 cat', "\u202eright to left", "half \ud83d", "nul \x00 one"]
    image = Image.new("RGB", (16, 16))
    strips = {"Training captions: one": [Sample(prompt, image) for prompt in prompts]}
    page = render(report(strips=strips, prompts=prompts, command="train.py --config 'a b.yaml' <x>"))
    assert "<script" not in page
    assert "\x00" not in page
    assert page.count("<bdi>&lt;script&gt;alert(1)&lt;/script&gt;</bdi>") == 2
    assert "a &quot;quoted&quot; &amp; $5 cat" in page
    assert "train.py --config &#x27;a b.yaml&#x27; &lt;x&gt;" in page
    assert page.count("data:image/png;base64,") == 1 + len(prompts)


def test_a_page_of_half_a_surrogate_is_written(tmp_path: Path) -> None:
    write_report(report(prompts=["half \ud83d"]), tmp_path / "report.html")
    assert "half ?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_large_images_are_compressed() -> None:
    noise = Image.frombytes("RGB", (900, 700), np.random.default_rng(0).bytes(900 * 700 * 3))
    page = render(report(grids={"large": noise}))
    assert "data:image/jpeg;base64," in page


def test_seconds_of_a_resumed_run() -> None:
    """Lines every five updates; after the stop at 7 the next line, 10, speaks of the updates since."""
    lines = [("a", 5, 2.0), ("a", 10, 1.0), ("b", 1, 4.0)]
    records = [{"stage": stage, "step": step, "seconds": seconds} for stage, step, seconds in lines]
    assert training_seconds(records) == {"a": 5 * 2.0 + 5 * 1.0, "b": 4.0}


def test_metrics_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in metrics()), encoding="utf-8")
    assert read_metrics(path) == metrics()
    path.write_text('{"stage": "a", "step": 1}\n[1]\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2"):
        read_metrics(path)
