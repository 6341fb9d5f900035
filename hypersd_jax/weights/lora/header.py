"""The sampling settings in a LoRA's safetensors header, and whether this package wrote it.

Other trainers' headers have keys of the same names with other meanings ("steps": "1500 / 3000" of training,
"sampler": "prodigy"), so only a header that this package has written is taken at its word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

SETTINGS = ("sampler", "steps", "eta", "guidance", "timesteps", "original_inference_steps")
"""The keys that say how to sample."""

MARK = "hypersd_jax"
"""The key by which a header is known as ours; its value is the version of the keys' meaning."""

_VERSION = "1"
_FINGERPRINT, _COMMENT = "base_fingerprint", "ss_training_comment"


def is_ours(header: Mapping[str, str]) -> bool:
    """Tell whether the settings in a header are ones that this package wrote.

    By the mark; in files from before there was one by the keys that every exported student had; and in merges of such
    files, which may have lost those, by all settings together agreeing with one another, which is no accident.
    """
    if MARK in header or _FINGERPRINT in header or header.get(_COMMENT, "").startswith("hypersd_jax "):
        return True
    if not all(key in header for key in SETTINGS):
        return False
    try:
        timesteps = json.loads(header["timesteps"])
        return isinstance(timesteps, list) and len(timesteps) == int(header["steps"])
    except (ValueError, RecursionError):
        return False


def stated(header: Mapping[str, str]) -> dict[str, str]:
    """The sampling settings of a header of ours, as they are written; {} of any other header."""
    return {key: header[key] for key in SETTINGS if key in header} if is_ours(header) else {}


def marked(header: Mapping[str, Any]) -> dict[str, Any]:
    """A header of ours, with the mark where it states settings."""
    return {**header, MARK: _VERSION} if any(key in header for key in SETTINGS) else dict(header)


def carried(header: Mapping[str, str]) -> dict[str, str]:
    """A header for a file made from one that had this: with the mark where it is ours, as it is where it is not."""
    return marked(header) if is_ours(header) else dict(header)


def merged(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """A header for the sum of several files: entries about which no two disagree, and settings as sampling has them.

    The settings are those of the last file that states any, as they are when the files are loaded in this order. What
    another trainer's header calls by the same name is then left out.
    """
    values: dict[str, set[str]] = {}
    for header in headers:
        for key, value in header.items():
            values.setdefault(key, set()).add(value)
    agreed = {key: found.pop() for key, found in values.items() if len(found) == 1}
    settings = next((found for header in reversed(headers) if (found := stated(header))), None)
    if settings is None:
        return agreed
    return marked({**{key: value for key, value in agreed.items() if key not in SETTINGS}, **settings})
