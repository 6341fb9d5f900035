"""Check a command's files and names before JAX is imported, which takes seconds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from hypersd_jax import presets
from hypersd_jax.config import Config, utf8
from hypersd_jax.errors import UserError
from hypersd_jax.paths import parse_lora, require_id, require_model_folder

EMBEDDED, EMOJI = "embedded", "emoji"


def check_model(source: str) -> None:
    """UserError unless it is the embedded model, a model's folder, a file, or may be a hub id."""
    if source == EMBEDDED:
        return
    if os.path.isdir(source):
        require_model_folder(Path(source))
    check_source(source)


def check_source(source: str | Path) -> None:
    """UserError unless something of this name is here, or it may be a hub id."""
    if not os.path.exists(source):
        require_id(source)


def check_loras(texts: Iterable[str]) -> None:
    """UserError naming a ``FILE[@SCALE]`` whose file is not here, and is no hub id."""
    for text in texts:
        check_source(parse_lora(text)[0])


def check_files(option: str, paths: Iterable[str | Path | None]) -> None:
    """UserError naming the option and a file that is missing, or is a folder; None is left out."""
    for path in paths:
        if path is None:
            continue
        if os.path.isdir(path):
            raise UserError(f"{option} {path}: is a folder, expected a file")
        if not os.path.exists(path):
            raise UserError(f"{option} {path}: no such file")


def check_target_file(path: str | Path) -> None:
    """UserError where a file is to be written and a folder has its name."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder, so no file of that name can be written")


def check_target_folder(option: str, path: str | Path) -> None:
    """UserError where a folder is to be written, new or there already, and a file has its name."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{option} {path}: is a file, expected a folder")


def check_preset(name: str | None) -> None:
    """UserError for a preset that is not known."""
    if name is not None:
        presets.find(name)


def check_config(config: Config) -> None:
    """UserError naming a key of a run whose file or folder is not here."""
    try:
        check_model(config.model.source)
    except UserError as error:
        raise UserError(f"model: {error}") from None
    _check_data(config.data.source)
    utf8(os.path.abspath(config.output_dir), "output_dir")  # as checkpoints ask for
    if os.path.exists(config.output_dir) and not os.path.isdir(config.output_dir):
        raise UserError(f"output_dir: {config.output_dir} is a file, expected a folder")


def _check_data(source: str) -> None:
    """Refuse what can be nothing but a local path and is not there; docs/data.md lists what else there is."""
    if os.path.isdir(source) and not any(os.scandir(source)):
        raise UserError(f"data.source: {source} is an empty folder")
    local = source.startswith(("/", "./", "../", "~")) and not re.search(r"[*?\[{]|://|::", source)
    if local and not os.path.exists(source):
        raise UserError(f"data.source: {source} is no folder, file, pattern or URL with files, nor {EMOJI!r}")
