"""JSON files with one thing wrong: in the tree, or in the text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.models.clip_text import ClipTextConfig
from hypersd_jax.models.unet_config import DEFAULTS as UNET_KEYS
from hypersd_jax.models.vae_config import DEFAULTS as VAE_KEYS

KEYS = (
    *UNET_KEYS,
    *VAE_KEYS,
    *ClipTextConfig.__dataclass_fields__,
    *Schedule.__dataclass_fields__,
    *("_class_name", "num_encoder_blocks", "encoder_block_out_channels", "force_zeros_for_empty_prompt"),
    *("thresholding", "timestep_spacing", "use_karras_sigmas", "use_beta_sigmas", "sigma_min", "sigma_max"),
    *("final_sigmas_type", "interpolation_type", "timestep_scaling", "original_inference_steps", "solver_order"),
    *(
        "lambda_min_clipped",
        "timestep_type",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "r",
        "lora_alpha",
    ),
)
"""Names that some loader gives a meaning to, to be added where they do not belong."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 10**6, 10**9, 10**12, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, 0.5, -0.5, 1e-40, 1e38, 1e39, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "1", "None", "épée 日本 🎨", "a\nb", "\ud800", "../..", "\0", "(a+)+$", "("),
    *([], [[]], {}, [None], [1], [10**9], [0, -1], [1, "x"], {"": 0}, [[1], [2]], {"a": {"b": []}}),
)
"""Values to put where another belongs."""


def mutate_json(content: bytes, random: Random) -> tuple[str, bytes]:
    """(what was done, the changed file)."""
    if random.random() < 0.2:
        return _text(content, random)
    tree = json.loads(content)
    name = _tree(tree, random)
    return name, json.dumps(tree).encode("utf-8")


def mutate_object(content: dict[str, Any], random: Random) -> tuple[str, dict[str, Any]]:
    """(what was done, a changed copy)."""
    tree = copy.deepcopy(content)
    return _tree(tree, random), tree


def odd(random: Random) -> Any:
    """A value that rarely fits; lists of any length among them."""
    if random.random() < 0.1:
        return [random.choice(ODD)] * random.choice((1, 2, 3, 4, 50, 2000))
    return copy.deepcopy(random.choice(ODD))


def damage_text(text: bytes, random: Random) -> tuple[str, bytes]:
    """JSON text that is no JSON any more, or that few parsers agree on."""
    name = random.choice(tuple(_TEXTS))
    return name, _TEXTS[name](text, random)


def _tree(tree: Any, random: Random) -> str:
    places = list(_places(tree))
    if not places or random.random() < 0.15:
        if isinstance(tree, dict):
            tree[random.choice((*KEYS, "surprise", "_note"))] = odd(random)
        return "key added"
    parent, key = random.choice(places)
    change = random.choice(("replaced", "replaced", "replaced", "scaled", "removed", "renamed", "doubled"))
    value = parent[key]
    if change == "removed":
        del parent[key]
    elif change == "renamed" and isinstance(parent, dict):
        parent[random.choice((*KEYS, str(key) + "s", str(key).upper()))] = parent.pop(key)
    elif change == "doubled" and isinstance(value, list):
        parent[key] = value * random.choice((0, 2, 100))
    elif change == "scaled" and isinstance(value, int | float):
        parent[key] = value * random.choice((-1, 2, 3, 0.5, 10**3, 10**12))
    else:
        change, parent[key] = "replaced", odd(random)
    return f"value {change}"


def _places(tree: Any) -> Any:
    """Every (parent, key) of a JSON tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield tree, key
        yield from _places(value)


def _deep(_text: bytes, random: Random) -> bytes:
    depth = random.choice((100, 200, 5000, 100_000))
    return random.choice((b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth))


def _huge_number(text: bytes, random: Random) -> bytes:
    digits = random.choice((b"9" * 5000, b"1e9999", b"-1e9999", b"9" * 30, b"0." + b"0" * 400 + b"1"))
    return text.replace(b":", b":" + digits + b',"z":', 1) if b":" in text else digits


def _twice(text: bytes, _random: Random) -> bytes:
    inner = text.strip()[1:-1]
    return b"{" + inner + b"," + inner + b"}"


_TEXTS: dict[str, Callable[[bytes, Random], bytes]] = {
    "nested deeply": _deep,
    "a number of many digits": _huge_number,
    "every key twice": _twice,
    "no UTF-8": lambda text, random: _insert(text, bytes([random.randrange(128, 256)]), random),
    "UTF-16": lambda text, _: text.decode("utf-8", "replace").encode("utf-16"),
    "a byte order mark": lambda text, _: b"\xef\xbb\xbf" + text,
    "a lone surrogate": lambda text, _: text.replace(b'"', b'"\\ud800', 1),
    "NaN for a value": lambda text, _: text.replace(b":", b':NaN,"z":', 1),
    "empty": lambda _text, _: b"",
    "blank": lambda _text, _: b" \n ",
    "a list": lambda text, _: b"[" + text + b"]",
    "a scalar": lambda _text, random: random.choice((b"null", b"1", b'"text"', b"true", b"NaN")),
    "a trailing comma": lambda text, _: text.rstrip()[:-1] + b",}",
    "two texts": lambda text, _: text + text,
    "a zero byte": lambda text, random: _insert(text, b"\0", random),
    "cut": lambda text, random: text[: random.randrange(max(len(text), 1))],
    "a bit flipped": lambda text, random: flip(text, random),
}


def _text(content: bytes, random: Random) -> tuple[str, bytes]:
    return damage_text(content, random)


def _insert(text: bytes, piece: bytes, random: Random) -> bytes:
    at = random.randrange(len(text) + 1)
    return text[:at] + piece + text[at:]


def flip(content: bytes, random: Random) -> bytes:
    """One to eight bits changed, anywhere."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8)) if changed else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)
