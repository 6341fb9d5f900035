"""One canvas of a tiny model for all tests of the room."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from tests.helpers.live import Canvas, write_model


@pytest.fixture(scope="session")
def live_files(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    return write_model(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="session")
def canvas(live_files: argparse.Namespace) -> Iterator[Canvas]:
    made = Canvas(live_files)
    yield made
    made.close()
