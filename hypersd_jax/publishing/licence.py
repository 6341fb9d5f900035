"""Under which licence a LoRA may be published: as its author says, else as its base model's says. Never invented."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from hypersd_jax.errors import UserError

KNOWN = {
    "embedded": "apache-2.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
"""The hub's ids of the licences that base models are under."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def find_licence(given: str | None, source: str, base_model: str | None) -> tuple[str, str]:
    """The hub's id of the licence, and where it is from, in words.

    Args:
        given: as the author says.
        source: the base, as the run names it: a hub id, ``embedded``, a folder or a file.
        base_model: its hub id, where the author says that.

    Raises:
        UserError: it is no id; or nobody says, and the base is not known.
    """
    if given is not None:
        if not _ID.fullmatch(given):
            raise UserError(f"--license {given}: must be an id of the hub's, such as openrail++ or mit")
        return given, "chosen by the author"
    for name in (base_model, source):
        if name in KNOWN:
            return KNOWN[name], "that of the base model"
    stated = front_matter(Path(source) / "README.md").get("license") if Path(source).is_dir() else None
    if isinstance(stated, str) and _ID.fullmatch(stated):
        return stated, "that which the base model's own card states"
    raise UserError(f"--license is missing: the licence of the base {base_model or source} is not known here")


def front_matter(card: Path) -> dict[str, object]:
    """The YAML at the head of a model card; {} where there is none that can be read."""
    try:
        parts = card.read_text(encoding="utf-8").split("---", 2)
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
