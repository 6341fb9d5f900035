"""A reward is named by all the files that its loader may read."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.rewards import contents_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model.safetensors", "config.json", "head.safetensors"):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "head.safetensors"])
def test_every_file_of_a_folder_counts(folder: Path, name: str) -> None:
    before = contents_digest(folder)
    assert contents_digest(folder) == before
    (folder / name).write_text("another")
    assert contents_digest(folder) != before


def test_what_no_loader_reads_does_not(folder: Path) -> None:
    before = contents_digest(folder)
    for name in ("pytorch_model.bin", ".gitattributes"):
        (folder / name).write_text("")
    assert contents_digest(folder) == before


@pytest.mark.parametrize(
    ("name", "counts"),
    [("head.safetensors", True), ("model.safetensors", True), ("config.json", True), ("other.safetensors", False)],
)
def test_of_a_file_and_what_belongs_to_it(folder: Path, name: str, counts: bool) -> None:
    """An aesthetic head is nothing without the CLIP beside it; another head beside it is."""
    before = contents_digest(folder / "head.safetensors")
    (folder / name).write_text("another")
    assert (contents_digest(folder / "head.safetensors") != before) == counts


def test_under_another_name_it_is_the_same(folder: Path) -> None:
    before = contents_digest(folder / "head.safetensors")
    assert contents_digest((folder / "head.safetensors").rename(folder / "v2.safetensors")) == before


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.safetensors: cannot be read"):
        contents_digest(tmp_path / "nothing.safetensors")
