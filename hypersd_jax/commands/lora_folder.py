"""LoRAs by name: the files of a folder and its sub-folders, as user interfaces keep them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from hypersd_jax.errors import UserError
from hypersd_jax.paths import parse_id, parse_lora

_SUFFIX = ".safetensors"
# Files that are called as all of their kind are, so that their folder's name is the LoRA's.
_UNNAMED = ("adapter_model", "pytorch_lora_weights")
_SHOWN = 5


def find_loras(texts: Iterable[str], folder: Path | None) -> list[str]:
    """``FILE[@SCALE]`` of each text, the names among them replaced by the files of a folder that have them.

    A path that exists is taken as it is. A name is a file's without its suffix, with or without the sub-folder that it
    is in; where no file has it as written, upper and lower case are one.

    Args:
        texts: as `parse_lora` reads them.
        folder: where names are looked for; None: nowhere, so that all are paths or hub ids.

    Raises:
        UserError: the folder is none; a name is that of several files, which are listed, or of none, with the nearest.
    """
    if folder is None:
        return list(texts)
    if not folder.is_dir():
        raise UserError(f"--lora-dir {folder}: no such folder")
    named: dict[str, list[Path]] | None = None
    found = []
    for text in texts:
        name, scale = parse_lora(text)
        if os.path.exists(name):
            found.append(text)
            continue
        named = _by_name(folder) if named is None else named
        file = _chosen(str(name), named, folder)
        found.append(text if file is None else f"{file}@{scale!r}")
    return found


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """Every name of every LoRA below a folder; links to folders are followed, as people link their collections."""
    named: dict[str, list[Path]] = {}
    seen = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(at)) in seen:
            folders.clear()  # a link that leads back, or to what another one leads to
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            if not name.endswith(_SUFFIX) or name.startswith("."):
                continue
            file = Path(at) / name
            own = file.parent if file.stem in _UNNAMED and file.parent != folder else file
            path = own.relative_to(folder).as_posix().removesuffix(_SUFFIX)
            for spelled in {path, path.rpartition("/")[2]}:
                named.setdefault(spelled, []).append(own)
    return named


def _chosen(name: str, named: dict[str, list[Path]], folder: Path) -> Path | None:
    """The one file of this name; None for what may be a hub id instead."""
    wanted = name.removesuffix(_SUFFIX)
    files = named.get(wanted) or [
        file for spelled, each in named.items() if spelled.casefold() == wanted.casefold() for file in each
    ]
    files = list(dict.fromkeys(files))
    if len(files) == 1:
        return files[0]
    if files:
        listed = ", ".join(str(file) for file in files[:_SHOWN]) + (", ..." if len(files) > _SHOWN else "")
        raise UserError(f"--lora {name}: {len(files)} files in {folder} have this name ({listed}); write the path")
    if parse_id(name) is not None:
        return None
    close = difflib.get_close_matches(wanted, named, n=3)
    near = f"; near it: {', '.join(close)}" if close else ""
    raise UserError(f"--lora {name}: no such file, and no LoRA of this name in {folder}{near}")
