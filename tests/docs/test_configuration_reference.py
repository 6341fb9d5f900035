"""docs/configuration.md is what scripts/configuration_reference.py makes of the dataclasses, and leaves no key out."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

from hypersd_jax.config import Config, build, load_config, to_dict
from hypersd_jax.errors import UserError
from hypersd_jax.recipes import recipe_files

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "configuration.md"
COMMAND = "python scripts/configuration_reference.py docs/configuration.md"
RECIPE = {"output_dir": "out", "stages": [{"name": "one", "k": 1, "updates": 1, "batch_size": 1}]}


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "configuration_reference", ROOT / "scripts/configuration_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oven:
    """An oven, for cakes.

    ``heat`` is in degrees (arXiv 1. 2). ``width``, ``depth`` and ``height``: its sides; ``fan`` turns the air; it is
    loud. What is baked for ``minutes`` is done.
    """

    heat: float
    width: int = 3
    depth: int = 3
    height: int | None = None
    fan: bool = False
    minutes: tuple[float, float] = (0.5, 30.0)
    door: Literal["left", "right"] = "left"

    def __post_init__(self) -> None:
        for key in ("width", "depth"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.heat <= 0 or self.minutes[0] < 0:
            raise ValueError("heat must be above 0 and minutes at least 0")
        if self.fan and self.heat > 300:
            raise ValueError(f"fan: too hot at {self.heat}")


@dataclasses.dataclass(frozen=True)
class Listed:
    """A shop, which sells ``cakes``.

    Attributes:
        cakes: how many, of
            all sorts.
        open: whether one may go in.
    """

    cakes: int = 1
    open: bool = True


def keys(tree: Any, path: str = "") -> Iterator[str]:
    """The last part of every key in plain data."""
    for key, value in tree.items():
        yield key
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, dict):
                yield from keys(part)


def test_the_page_is_up_to_date(reference: ModuleType) -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.page(), f"run `{COMMAND}`"


def test_every_key_stands_there_with_a_meaning(reference: ModuleType) -> None:
    shown = [key for section in reference.sections() for key in section.keys]
    silent = [f"{key.owner.__name__}.{key.name}" for key in shown if not key.meaning]
    assert not silent, f"explain in its docstring, or in MEANINGS: {silent}"
    names = {key.name for key in shown}
    for name, file in recipe_files().items():
        missing = set(keys(to_dict(load_config(file)))) - names
        assert not missing, (name, missing)


def test_nothing_is_explained_twice(reference: ModuleType) -> None:
    classes = {key.owner.__name__: key.owner for section in reference.sections() for key in section.keys}
    for entry in reference.MEANINGS:
        owner, _, name = entry.partition(".")
        assert name in reference.own_fields(classes[owner]), f"no such key: {entry}"
        assert name not in reference.doc_of(classes[owner]).explained, f"its docstring explains it: {entry}"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("lora.rank", 0, "at least 1"),
        ("data.white_fraction", 2.0, "in 0..1"),
        ("log.stop_after_skipped", 0, "at least 1"),
        ("stages.0.clip_norm", 0.0, "above 0"),
        ("stages.0.solver_steps", 0, "at least 1"),
        ("evaluation.batch_size", 0, "at least 1"),
    ],
)
def test_the_ranges_are_those_that_are_refused(reference: ModuleType, path: str, value: Any, said: str) -> None:
    *places, name = path.split(".")
    places = ["*" if place.isdigit() else place for place in places]
    rows = [key for section in reference.sections() if f"`{'.'.join(places)}`" in section.title for key in section.keys]
    assert said in " ".join(key.value for key in rows if key.name == name)
    part = RECIPE["stages"][0] if places[0] == "stages" else {}  # type: ignore[index]
    changed = {**part, name: value}  # type: ignore[dict-item]
    with pytest.raises(UserError, match=f"{re.escape(name)}.* {re.escape(said)}"):
        build(Config, {**RECIPE, places[0]: [changed] if places[0] == "stages" else changed})


def test_sentences_are_given_to_the_keys_that_begin_them(reference: ModuleType) -> None:
    doc = reference.doc_of(Oven)
    assert doc.general == "An oven, for cakes. What is baked for `minutes` is done."
    sides = "`width`, `depth` and `height`: its sides."
    assert doc.explained == {
        "heat": "`heat` is in degrees (arXiv 1. 2).",
        **dict.fromkeys(("width", "depth", "height"), sides),
        "fan": "`fan` turns the air; it is loud.",
    }
    assert doc.mentioned["minutes"] == "What is baked for `minutes` is done."


def test_attributes_are_read_where_a_docstring_has_them(reference: ModuleType) -> None:
    doc = reference.doc_of(Listed)
    assert doc.general == "A shop, which sells `cakes`."
    assert doc.explained == {"cakes": "How many, of all sorts.", "open": "Whether one may go in."}


def test_values_defaults_and_rules(reference: ModuleType) -> None:
    rows = {key.name: (key.value, key.default) for key in reference.keys_of(Oven)}
    assert rows == {
        "heat": ("number; above 0", "required"),
        "width": ("whole number; at least 1", "`3`"),
        "depth": ("whole number; at least 1", "`3`"),
        "height": ("whole number or `null`", "`null`"),
        "fan": ("`true` or `false`", "`false`"),
        "minutes": ("list of 2 numbers; at least 0", "`[0.5, 30]`"),
        "door": ("`left`, `right`", "`left`"),
    }
    assert reference.ranges(Oven)[1] == ["fan: too hot at …"]
