"""A TPU's own kernels in programs for several chips, which the compiler cannot split by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.devices
def test_encoder_and_decoder_lower_for_several_tpu_chips(tmp_path):
    """Each holds the attention kernel; without a layout of the batch, lowering it is refused."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bases.scripts.tpu_lowering", str(tmp_path / "model")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert kernels == {"encode": 1, "decode": 1, "predict": 1}
