"""The folder that a publication is written to; imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

from hypersd_jax.errors import UserError

MARK = ".hypersd_publish"
"""A file by which a folder is known as one of ours, which may be replaced; it is not uploaded."""


def check_target(target: Path) -> None:
    """UserError unless a folder may be written here: a new one, an empty one, or an earlier one of ours."""
    if os.path.lexists(target) and not target.is_dir():
        raise UserError(f"--output {target}: is a file, expected a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / MARK).is_file():
        raise UserError(f"--output {target}: holds other files; name a new folder")
