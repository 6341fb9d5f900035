"""``--lora NAME`` with ``--lora-dir``: which file a name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypersd_jax.commands.lora_folder import find_loras
from hypersd_jax.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A collection with sub-folders, one of them a link to elsewhere, and names that occur twice."""
    root, elsewhere = tmp_path / "loras", tmp_path / "elsewhere"
    files = ["ink.safetensors", "sdxl/ink-2.safetensors", "sdxl/moss.safetensors", "sd15/moss.safetensors"]
    for file in [*files, "peft/adapter_model.safetensors", "peft/adapter_config.json", "notes.txt", "ink.ckpt"]:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    elsewhere.mkdir()
    (elsewhere / "Far.v1.safetensors").touch()
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    return root


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [
        ("ink", "ink.safetensors", "1.0"),
        ("ink.safetensors@0.5", "ink.safetensors", "0.5"),
        ("ink-2@-1", "sdxl/ink-2.safetensors", "-1.0"),
        ("sdxl/moss@0.25", "sdxl/moss.safetensors", "0.25"),
        ("INK", "ink.safetensors", "1.0"),
        ("peft", "peft", "1.0"),
    ],
)
def test_a_name_is_one_file(folder: Path, text: str, file: str, scale: str) -> None:
    assert find_loras([text], folder) == [f"{folder / file}@{scale}"]


def test_an_existing_path_and_a_hub_id_stay(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ink").touch()
    given = ["ink@0.5", str(folder / "sdxl" / "moss.safetensors"), "owner/name@0.5", "owner/name@main@0.5"]
    assert find_loras(given, folder) == given
    assert find_loras(["moss"], None) == ["moss"]


def test_several_files_are_listed(folder: Path) -> None:
    with pytest.raises(UserError) as refusal:
        find_loras(["moss@0.5"], folder)
    listed = f"{folder / 'sd15' / 'moss.safetensors'}, {folder / 'sdxl' / 'moss.safetensors'}"
    assert str(refusal.value) == f"--lora moss: 2 files in {folder} have this name ({listed}); write the path"


def test_a_linked_folder_that_leads_back_ends(folder: Path) -> None:
    assert find_loras(["linked/Far.v1"], folder) == [f"{folder / 'linked' / 'Far.v1.safetensors'}@1.0"]


def test_near_names_are_offered(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--lora mos: no such file, and no LoRA of this name in .*; near it: moss"):
        find_loras(["mos"], folder)
