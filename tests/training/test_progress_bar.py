"""The bar of a stage says that its first step compiles, and leaves that out of its rate."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from hypersd_jax.training.logging import MetricsLog


def test_compiling_is_named_and_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path, 3, "tscd-8", tensorboard=False) as log:
        time.sleep(1.0)  # the compilation
        for step in (1, 2, 3):
            log.write(step, {"loss": 1.0})
    shown = capsys.readouterr().err.replace("\r", "\n").split("\n")
    bars = [line.strip() for line in shown if line.strip()]
    assert bars[0].startswith("tscd-8: compiling (once):   0%")
    assert bars[-1].startswith("tscd-8: 100%")
    rate = re.search(r"([\d.]+)step/s", bars[-1])  # slower than one a second would be s/step
    assert rate is not None
    assert float(rate[1]) > 20


def test_a_finished_stage_compiles_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path, 3, "tscd-8", 3, tensorboard=False):
        pass
    assert "compiling" not in capsys.readouterr().err
