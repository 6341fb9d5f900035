"""A LoRA layout that is registered from outside is one like the others: read, converted and written by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hypersd_jax as hs
from hypersd_jax.adapters import Adapter
from hypersd_jax.cli import main
from hypersd_jax.errors import UserError
from hypersd_jax.weights import open_tensors, read_lora, write_lora
from hypersd_jax.weights.families import adaptable_shapes
from hypersd_jax.weights.lora.factors import to_torch
from hypersd_jax.weights.lora.layout import Destination, Found, Key, Layout, Match, Shapes, Slot, Strength
from hypersd_jax.weights.lora.registry import LAYOUTS, register_layout
from tests.helpers.configs import TINY
from tests.helpers.lora_files import assert_same_delta, random_adapter, torch_factors

SHAPES = adaptable_shapes(TINY)
ADAPTER = random_adapter(SHAPES["unet"], 0)
ROLES = {"first": "down", "second": "up"}


def parse(text: str) -> Key | None:
    """``toy|COMPONENT|MODULE|first`` and ``second``."""
    mark, *rest = text.split("|")
    if mark != "toy" or len(rest) != 3 or rest[2] not in ROLES:
        return None
    return Key(component=rest[0], module=rest[1], role=ROLES[rest[2]], layout="toy")


def matcher(_: Any, shapes: Shapes) -> Match:
    def match(text: str) -> Found | None:
        key = parse(text)
        if key is None:
            return None
        exists = f"{key.module}.kernel" in shapes.get(str(key.component), {})
        return Found(key=key, target=(str(key.component), key.module) if exists else None)

    return match


def strengths(_: Path, header: Mapping[str, str]) -> Strength:
    def strength(slot: Slot, rank: int, where: str) -> tuple[float, float | None]:
        return float(header.get("toy_strength", 1)), None

    return strength


def encode(component: str, adapter: Adapter, to: Destination) -> Iterator[tuple[str, np.ndarray]]:
    for module, entry in adapter.items():
        down, up = to_torch(module, entry, to.dtype)
        yield f"toy|{component}|{module}|first", down
        yield f"toy|{component}|{module}|second", up


TOY = Layout(
    name="toy",
    matcher=matcher,
    spelled=parse,
    strengths=strengths,
    encode=encode,
    describe=lambda adapters: {"toy_strength": "1"},
    about_factors=("toy_strength",),
)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, "toy", TOY)  # so that it is taken out again
    del LAYOUTS["toy"]
    register_layout(TOY)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of the layout whose header halves the strength."""
    tensors = {}
    for module, entry in ADAPTER.items():
        down, up = torch_factors(entry)
        tensors |= {f"toy|unet|{module}|first": down, f"toy|unet|{module}|second": up}
    path = tmp_path / "toy.safetensors"
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path, {"toy_strength": "0.5"})
    return path


def halved() -> Adapter:
    return {module: {**entry, "scale": np.full_like(entry["scale"], 0.5)} for module, entry in ADAPTER.items()}


def test_it_is_read(registered: None, file: Path) -> None:
    lora = read_lora(file, SHAPES)
    assert_same_delta(lora.adapters["unet"], halved())
    assert (lora.report.layout, lora.report.modules) == ("toy", {"unet": len(ADAPTER)})


def test_what_does_not_fit_is_refused_by_name(registered: None, file: Path, tmp_path: Path) -> None:
    tensors = load_file(file)
    save_file({**tensors, "toy|unet|nowhere|first": np.ones((4, 4), np.float32)}, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"no such module in this base: toy\|unet\|nowhere\|first"):
        read_lora(tmp_path / "bad.safetensors", SHAPES)
    wide = adaptable_shapes({"unet": {**TINY["unet"], "cross_attention_dim": 24}})
    with pytest.raises(UserError, match="for a model with cross-attention width 16, this one has 24"):
        read_lora(file, wide)


def test_it_is_converted_without_a_base(registered: None, file: Path, tmp_path: Path) -> None:
    report = hs.convert_lora(file, tmp_path / "kohya.safetensors", "kohya")
    assert report.layout == "toy"
    assert_same_delta(read_lora(tmp_path / "kohya.safetensors", SHAPES).adapters["unet"], halved())
    with open_tensors(tmp_path / "kohya.safetensors") as tensors:
        assert "toy_strength" not in tensors.metadata


def test_it_is_written(registered: None, tmp_path: Path) -> None:
    write_lora(tmp_path / "peft.safetensors", {"unet": ADAPTER}, layout="peft")
    main(["convert", "lora", str(tmp_path / "peft.safetensors"), str(tmp_path / "out.safetensors"), "--to", "toy"])
    assert_same_delta(read_lora(tmp_path / "out.safetensors", SHAPES).adapters["unet"], ADAPTER)
    assert all(key.startswith("toy|") for key in load_file(tmp_path / "out.safetensors"))


def test_a_name_is_taken_once(registered: None) -> None:
    with pytest.raises(ValueError, match="'toy'"):
        register_layout(TOY)


def test_unregistered_it_is_unknown(file: Path) -> None:
    with pytest.raises(UserError, match="is not a LoRA file"):
        read_lora(file, SHAPES)
    with pytest.raises(UserError, match="LoRA layout 'toy': choose one of kohya, kohya-sgm, peft"):
        write_lora(file, {"unet": ADAPTER}, layout="toy")
