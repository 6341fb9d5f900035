"""Tables that `datasets` makes, and the sizes of images that are kept, stay out of the user's home."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hypersd_jax.data import image_sizes


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import datasets

    home: Path = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", home / "downloads")
    monkeypatch.setattr(image_sizes, "cache_folder", lambda: home / "image-sizes")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
