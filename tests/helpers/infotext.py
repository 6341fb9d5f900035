"""An image's text as AUTOMATIC1111's web UI reads it: the rules of its modules/infotext_utils.py, written anew."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# A key of two characters and more, then a quoted value whose backslashes escape, or all up to the next comma.
ENTRY = re.compile(
    r"""\s* (?P<key> \w [\w\ /-]+ ) : \s*
        (?P<value> " (?: \\ . | [^"\\] )+ " | [^,]* )
        (?: , | $ )""",
    re.VERBOSE,
)
SIZE = re.compile(r"(\d+)x(\d+)")
LORA = re.compile(r"<(\w+):([^>]+)>")


@dataclass(frozen=True, kw_only=True)
class Infotext:
    prompt: str
    negative: str
    values: dict[str, str]

    @property
    def bare_prompt(self) -> str:
        return LORA.sub("", self.prompt).strip()

    @property
    def loras(self) -> list[tuple[str, float]]:
        """The LoRAs that the web UI would load: names and scales."""
        found = [match[2].split(":") for match in LORA.finditer(self.prompt) if match[1] == "lora"]
        return [(name, float(scale)) for name, scale in found]


def parse(text: str) -> Infotext:
    lines = text.strip().split("\n")
    entries = list(ENTRY.finditer(lines[-1]))
    if len(entries) >= 3:  # fewer: the last line is still prompt
        lines.pop()
    else:
        entries = []
    parts: dict[str, list[str]] = {"prompt": [], "negative": []}
    part = "prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            part, line = "negative", line.removeprefix("Negative prompt:").strip()
        parts[part].append(line)
    values: dict[str, str] = {}
    for entry in entries:
        key, value = entry["key"], entry["value"]
        if value[0] == value[-1] == '"':
            value = json.loads(value)
        if size := SIZE.fullmatch(value):
            values |= {f"{key}-1": size[1], f"{key}-2": size[2]}
        else:
            values[key] = value
    return Infotext(prompt="\n".join(parts["prompt"]), negative="\n".join(parts["negative"]), values=values)


def text_of(path: Path) -> str:
    """The text inside an image: a PNG's ``parameters``, else EXIF's UserComment as piexif reads it."""
    with Image.open(path) as image:
        if image.format == "PNG":
            return str(image.text["parameters"])
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return bytes(comment[8:]).decode("utf-16-be")
