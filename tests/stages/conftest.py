"""One model for the runs of many files, which then share its training steps (`tests.helpers.short_runs`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny_model import smaller, tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smaller(tiny_model(tmp_path_factory.mktemp("model")))
