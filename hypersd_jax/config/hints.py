"""Suggest the right key for a wrong one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hypersd_jax.config.kinds import kinds

# What other programs call a key, and what it may be here.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate",),
    "bs": ("batch_size",),
    "train_batch_size": ("batch_size",),
    "per_device_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("accumulate",),
    "wd": ("weight_decay",),
    "adam_beta1": ("beta1",),
    "adam_beta2": ("beta2",),
    "adam_weight_decay": ("weight_decay",),
    "max_grad_norm": ("clip_norm",),
    "lr_scheduler": ("schedule",),
    "lr_warmup_steps": ("warmup",),
    "steps": ("updates", "steps"),
    "num_steps": ("updates",),
    "max_steps": ("updates",),
    "max_train_steps": ("updates",),
    "iterations": ("updates",),
    "epochs": ("updates",),
    "num_train_epochs": ("updates",),
    "ema_decay": ("ema",),
    "lora_rank": ("rank",),
    "lora_alpha": ("alpha",),
    "size": ("resolution",),
    "image_size": ("resolution",),
    "precision": ("dtype",),
    "mixed_precision": ("dtype",),
    "gradient_checkpointing": ("remat",),
    "checkpointing_steps": ("checkpoint_every",),
    "out": ("output_dir",),
    "output": ("output_dir",),
    "output_folder": ("output_dir",),
    "dataset": ("data",),
    "dataset_name": ("data",),
    "data_dir": ("data",),
    "train_data_dir": ("data",),
    "base": ("model",),
    "ckpt": ("model",),
    "pretrained_model_name_or_path": ("model",),
    "cfg": ("guidance",),
    "guidance_scale": ("guidance",),
}


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint ``; did you mean 'x'?`` or the list of valid names."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; valid names are {', '.join(names)}"


def key_hint(root: type, path: str, siblings: Sequence[str]) -> str:
    """A hint for a key that does not belong where it is: a sibling, or its path elsewhere under ``root``.

    Args:
        root: the dataclass of the configuration.
        path: the dotted path of the key.
        siblings: the keys that do belong there.
    """
    parent, _, name = path.rpartition(".")
    here = re.sub(r"\.\d+(?=\.|$)", ".*", parent)
    found = [other for other in _called(name) if other in siblings]
    found = found or [path for path in _named_paths(root, _called(name)) if path.rpartition(".")[0] != here]
    if not found and not difflib.get_close_matches(name, siblings, n=1):
        found = [path for path in key_paths(root, name) if path.rpartition(".")[0] != here]
    return f"; did you mean {' or '.join(found)}?" if found else nearest(name, siblings)


def key_paths(root: type, name: str) -> list[str]:
    """Find the paths under ``root`` of a key of about this name, or of its name here: those highest up."""
    name = name.replace("-", "_").lower()
    close = difflib.get_close_matches(name, _known(root), n=1)
    return _named_paths(root, _called(name)) or _named_paths(root, close)


def _called(name: str) -> tuple[str, ...]:
    """The names that a key may have here."""
    name = name.replace("-", "_").lower()
    return SYNONYMS.get(name, (name,))


def _named_paths(root: type, names: Iterable[str]) -> list[str]:
    return [path for name in names for path in _known(root).get(name, ())]


@functools.cache
def _known(root: type) -> dict[str, tuple[str, ...]]:
    """Every name of a key, and the highest of the paths that end in it."""
    paths: dict[str, list[str]] = {}
    for path in dict.fromkeys(_paths(root, "")):
        paths.setdefault(path.rpartition(".")[2], []).append(path)
    return {name: tuple(p for p in found if _depth(p) == min(map(_depth, found))) for name, found in paths.items()}


def _depth(path: str) -> int:
    """The depth of a key; that of an entry counts as its list's."""
    return path.replace(".*", "").count(".")


def _paths(kind: Any, prefix: str) -> Iterator[str]:
    """The dotted paths of all fields in a type; a list's entries are ``*``."""
    if dataclasses.is_dataclass(kind):
        for cls in dict.fromkeys(kinds(kind).values()) or [kind]:  # type: ignore[arg-type]
            hints = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                yield f"{prefix}{field.name}"
                yield from _paths(hints[field.name], f"{prefix}{field.name}.")
    elif typing.get_origin(kind) is tuple:
        for inner in typing.get_args(kind):
            yield from _paths(inner, f"{prefix}*.")
    else:
        for inner in typing.get_args(kind):
            if not isinstance(inner, str):
                yield from _paths(inner, prefix)
