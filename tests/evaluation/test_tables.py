"""Tables for a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypersd_jax.evaluation import COMPACT, plain_table, printed_table, write_rows

CAT = "\N{CJK UNIFIED IDEOGRAPH-732B}"
ROWS = [
    {"model": "teacher", "steps": 25, "distance": 0.0, "distance_se": None, "baseline": None},
    {
        "model": "\N{CJK UNIFIED IDEOGRAPH-732B}",
        "steps": 8,
        "distance": 0.25,
        "distance_se": 0.0104,
        "baseline": "8 steps",
    },
]


def test_columns_are_aligned() -> None:
    assert plain_table(ROWS).splitlines() == [
        "model    steps       distance  baseline",
        "teacher     25          0.000  \N{EN DASH}",
        f"{CAT}           8  0.250 \N{PLUS-MINUS SIGN} 0.010  8 steps",
    ]
    assert plain_table([]) == ""


def test_what_is_too_wide_follows_below() -> None:
    rows = [{"model": "m" * 200, **{f"key {number}": number * 1000 for number in range(30)}}]
    lines = plain_table(rows, width=60).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("m" * 19 + "\N{HORIZONTAL ELLIPSIS}" in line for line in lines) == lines.count("") + 1 > 2
    assert "29,000" in lines[-1]


@pytest.mark.parametrize(("encoding", "words"), [("utf-8", "0.250 ± 0.010"), ("ascii", "0.250 +- 0.010")])
def test_a_terminal_that_knows_few_signs(encoding: str, words: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "results.json", ROWS)
    text = printed_table(tmp_path / "results.json", COMPACT, encoding)
    assert words in text
    assert "baseline" not in text
    text.encode(encoding)
