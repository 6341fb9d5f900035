"""What the tables of programs compiled for TPUs say, from figures made by hand; and what is sent, from a small HLO."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.aot.hlo import collectives, shape_bytes
from benchmarks.tpu_aot import ROWS, Row, roofline_ms, scaling, table

FIGURES = {
    "date": "2026-01-01",
    "jax": "0.0",
    "compile_seconds": 1.0,
    "argument_bytes": 2**30,
    "temporary_bytes": 2**29,
    "peak_bytes": 2**31,
    "flops": 197e12,
    "bytes_accessed": 2 * 819e9,
    "collectives": {"all-reduce": {"count": 1, "bytes": 200e9}, "all-gather": {"count": 4, "bytes": 400e9}},
}
HLO = """HloModule m
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = f32[4,2]{1,0} all-gather(f32[1,2]{1,0} %x), dimensions={0}
  %s = (bf16[2]{0}, bf16[8]{0}) all-gather-start(bf16[2]{0} %y), dimensions={0}
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(f32[4]{0} %a), to_apply=%add
  %w = (s32[], f32[4]) while((s32[], f32[4]) %t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def row(**changed: object) -> dict[str, object]:
    return {**dataclasses.asdict(Row(family="sd15", program="tscd")), **FIGURES, **changed}


def test_rows_have_names_of_their_own() -> None:
    assert len({each.name for each in ROWS}) == len(ROWS)


def test_the_roofline_is_work_over_published_peaks() -> None:
    assert roofline_ms(row()) == pytest.approx((1000.0, 2000.0))


def test_more_chips_wait_for_the_sum_of_the_gradients() -> None:
    """Two seconds of computing; 2 s of gathers, and of the ring 2 (n - 1) / n seconds."""
    assert scaling(row(), 1) == pytest.approx(2 / 4)
    assert scaling(row(), 2) == pytest.approx(2 / 5)
    assert scaling(row(accumulate=4), 2) == pytest.approx(2 / (2 + 0.75))  # of one micro-batch


def test_a_page_of_rows_that_compiled_and_did_not() -> None:
    page = table([row(), {**row(), "program": "decode", "error": "too large"}])
    assert "| sd15 tscd, v5e:2x4 8x1, 8 rows | 1.00 | 0.50 | 2.00 | 197.00 | 1638.0 | 1000.0, 2000.0 |" in page
    assert "does not compile: too large" in page
    assert "| sd15 tscd, v5e:2x4 8x1, 8 rows | 34.8% |" in page


def test_collectives_of_a_loop_count_once_a_turn() -> None:
    assert shape_bytes("(f32[4,2]{1,0}, bf16[3])") == 38
    assert collectives(HLO) == {
        "all-reduce": {"count": 1, "bytes": 16},
        "all-gather": {"count": 6, "bytes": 3 * (32 + 16)},
    }
