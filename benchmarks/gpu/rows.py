"""Results as lines of JSON, each written to the disk as soon as it is measured."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "rows.jsonl"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows that one part of the benchmark adds to a folder's.

    Attributes:
        folder: where `FILE` is.
        part: the part's name, which each row carries.
    """

    folder: Path
    part: str

    def add(self, kind: str, **values: Any) -> None:
        """Append a row, and wait until the disk has it: the next measurement may end the machine."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": self.part, "kind": kind, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{self.part}: {kind} {values}", flush=True)


def read_rows(folder: Path) -> list[Row]:
    """Read all rows of a folder; a line that was cut off while it was written is left out."""
    file, found = folder / FILE, []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def drop_rows(folder: Path, parts: Collection[str]) -> None:
    """Remove the rows of these parts, which are about to be measured again."""
    kept = [json.dumps(row) + "\n" for row in read_rows(folder) if row["part"] not in parts]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text("".join(kept), encoding="utf-8")


def reason_of(error: BaseException) -> str:
    """Return an error's type and the first line of what it says, as it stands in a row."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}"[:300]
