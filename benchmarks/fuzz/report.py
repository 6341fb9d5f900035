"""The results of a run as Markdown."""

from __future__ import annotations

from collections import Counter
from typing import Any

COLUMNS = ("files", "refused", "loaded", "wrong", "slowest_ms", "largest_mb")


def report(content: dict[str, Any]) -> str:
    """A table of kinds, a line on the commands, and what went wrong."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    lines = [
        "# Loaders under mutated files",
        "",
        f"`{content['command']}`, {content['date']}, Python {content['python']}, {versions};"
        f" {content['files_per_second']} files/s on one core.",
        "",
        "Refused: one line, exit status 2. Loaded: the change did no harm, or none that a loader can see; shapes and"
        " finiteness were compared. Wrong: anything else, 5 s, or memory beyond twice the files and 64 MB.",
        "",
        *_kinds(content["kinds"]),
    ]
    if content["wrong"]:
        lines += ["| wrong | times | first file |", "|---|---|---|"]
        lines += [f"| {_cell(reason)} | {one['count']} | {one['file']} |" for reason, one in content["wrong"].items()]
        lines.append("")
    return "\n".join(lines + (_commands(content["commands"]) if content["commands"] else []))


def _kinds(kinds: dict[str, dict[str, Any]]) -> list[str]:
    total: dict[str, Any] = {key: sum(row[key] for row in kinds.values()) for key in COLUMNS[:4]}
    total |= {key: max((row[key] for row in kinds.values()), default=0) for key in COLUMNS[4:]}
    rows = [*kinds.items(), ("**all**", total)]
    return [
        "| kind | files | refused | loaded | wrong | slowest, ms | largest memory, MB |",
        "|---|---|---|---|---|---|---|",
        *(f"| {kind} | " + " | ".join(str(row[key]) for key in COLUMNS) + " |" for kind, row in rows),
        "",
    ]


def _commands(commands: list[dict[str, str]]) -> list[str]:
    outcomes = Counter(command["outcome"] for command in commands)
    return [
        f"Through the command line: {len(commands)} commands, {outcomes['refused']} refused with status 2 and one line,"
        f" {outcomes['done']} done with status 0, {outcomes['wrong']} wrong.",
        "",
        "| input | outcome | printed |",
        "|---|---|---|",
        *(f"| {_cell(one['what'])} | {one['outcome']} | {_cell(one['printed'])} |" for one in commands),
        "",
    ]


def _cell(text: str) -> str:
    short = text if len(text) <= 300 else f"{text[:300]}..."
    return " ".join(short.replace("|", "/").split()) or "-"
