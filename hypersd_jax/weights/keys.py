"""Names and layouts: PyTorch's on disk, ours in memory, as tables that read both ways.

A parameter path of ours is the diffusers or transformers module path plus a leaf. The leaf and the rank decide the name
and the layout on disk, whatever the model:

| leaf        | on disk  | layout on disk -> ours                                  |
|-------------|----------|---------------------------------------------------------|
| `kernel`    | `weight` | Linear (out, in) -> (in, out)                           |
|             |          | Conv (out, in, kh, kw) -> (kh, kw, in, out)             |
| `scale`     | `weight` | as it is                                                |
| `embedding` | `weight` | as it is                                                |
| any other   | the same | as it is                                                |

Files in the wild spell some modules in older ways. `TABLES` holds, per kind of component, the aliases that are read and
the extras that are passed over; what is written is always the one spelling that old and new releases of both libraries
load.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["unet", "vae", "clip"]

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
"""Leaf names of ours and what PyTorch calls them."""

PERMUTATIONS: dict[tuple[str, int], tuple[int, ...]] = {
    ("kernel", 2): (1, 0),
    ("kernel", 4): (2, 3, 1, 0),
}
"""(leaf, rank) -> axes of PyTorch's layout in the order of ours; where absent the layouts agree."""


@dataclass(frozen=True, kw_only=True)
class KeyTable:
    """The differences of one kind of component's files from the canonical spelling.

    Attributes:
        aliases: (pattern, replacement) pairs that turn a stored key into the canonical one; each applies at most once.
        pointwise: pattern of canonical keys that some files store as 1x1 convolutions, (out, in, 1, 1) for (out, in).
        extras: pattern of canonical keys that belong to no parameter of ours and may be passed over.
    """

    aliases: tuple[tuple[str, str], ...] = ()
    pointwise: str | None = None
    extras: str | None = None


TABLES: dict[Kind, KeyTable] = {
    "unet": KeyTable(),
    "vae": KeyTable(
        # diffusers before 0.16 had its own attention block in the autoencoder's middle.
        aliases=(
            (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
            (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
            (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
            (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
        ),
        pointwise=r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$",
    ),
    "clip": KeyTable(
        # transformers 5 writes CLIPTextModel without the prefix and reads it with and without; 4 needs it.
        aliases=((r"^(?=(embeddings|encoder|final_layer_norm)\.)", "text_model."),),
        extras=r"^text_model\.embeddings\.position_ids$|^logit_scale$|^text_projection\.weight$"
        r"|^vision_model\.|^visual_projection\.",
    ),
}


def torch_key(path: str) -> str:
    """The canonical name on disk of our parameter `path`."""
    module, _, leaf = path.rpartition(".")
    leaf = LEAVES.get(leaf, leaf)
    return f"{module}.{leaf}" if module else leaf


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape on disk of our parameter `path` of shape `shape`."""
    axes = _axes(path, len(shape))
    return tuple(shape[axes.index(axis)] for axis in range(len(shape)))


def from_torch(path: str, array: np.ndarray) -> np.ndarray:
    """A tensor in PyTorch's layout, viewed in the layout of our parameter `path`."""
    return array.transpose(_axes(path, array.ndim))


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch`: our parameter `path`, viewed in PyTorch's layout."""
    return array.transpose(np.argsort(_axes(path, array.ndim)))


def canonical_key(key: str, kind: Kind) -> str:
    """The canonical spelling of a key as stored in a file of a `kind` component."""
    for pattern, replacement in TABLES[kind].aliases:
        key = re.sub(pattern, replacement, key, count=1)
    return key


def is_extra(key: str, kind: Kind) -> bool:
    """Tell whether the canonical `key` is a known passenger that no network of this kind needs to read."""
    pattern = TABLES[kind].extras
    return pattern is not None and re.search(pattern, key) is not None


def drop_pointwise(key: str, shape: tuple[int, ...], kind: Kind) -> tuple[int, ...]:
    """The shape under which a stored tensor is read: without the 1x1 window where the table allows for one."""
    pattern = TABLES[kind].pointwise
    if pattern is not None and len(shape) == 4 and shape[2:] == (1, 1) and re.search(pattern, key):
        return shape[:2]
    return shape


def _axes(path: str, rank: int) -> tuple[int, ...]:
    return PERMUTATIONS.get((path.rpartition(".")[2], rank), tuple(range(rank)))
