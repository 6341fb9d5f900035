"""The file that says what was measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAME = "environment.json"


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """Read it; empty where it is not there, or was cut off while it was written."""
    try:
        return json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
