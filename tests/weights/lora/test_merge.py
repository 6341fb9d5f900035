"""Merging LoRA files: the exact sum, or its largest singular values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hypersd_jax.adapters import Adapter, concatenate, low_rank, scaled
from hypersd_jax.errors import UserError
from hypersd_jax.weights import open_tensors, read_lora, write_lora
from hypersd_jax.weights.families import adaptable_shapes
from hypersd_jax.weights.lora.merge import merge_loras
from tests.helpers.configs import TINY
from tests.helpers.lora_files import TEXT_TARGETS, assert_same_delta, dotted_tensors, random_adapter
from tests.helpers.lora_kinds import ours, random_kind

SHAPES = adaptable_shapes(TINY)
TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.1.resnets.0.conv1"


def delta(entry: Mapping[str, Any]) -> np.ndarray:
    return (np.asarray(entry["down"], np.float64) * entry["scale"]) @ np.asarray(entry["up"], np.float64)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for component, config in TINY.items():
        (tmp_path / "base" / component).mkdir(parents=True)
        (tmp_path / "base" / component / "config.json").write_text(json.dumps(config))
    return tmp_path / "base"


def kohya_kind(module: str, kind: str, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    *window, fan_in, fan_out = SHAPES["unet"][f"{module}.kernel"].shape
    tensors, change = random_kind(kind, (fan_out, fan_in, *window), seed)
    name = "lora_unet_" + module.replace(".", "_")
    return {f"{name}.{suffix}": np.ascontiguousarray(value) for suffix, value in tensors.items()}, ours(change)


def fast_and_style(tmp_path: Path) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """A LoRA of the UNet as kohya, and one of both parts as PEFT, with ranks and modules of its own."""
    fast = {"unet": random_adapter(SHAPES["unet"], 0)}
    style = {
        "unet": random_adapter(SHAPES["unet"], 1, rank=3, targets=("to_q", "conv1")),
        "text_encoder": random_adapter(SHAPES["text_encoder"], 2, rank=2, targets=TEXT_TARGETS),
    }
    header = {"hypersd_steps": "4", "ss_base_model_version": "sd_v1", "title": "fast"}
    write_lora(tmp_path / "fast.safetensors", fast, metadata=header)
    write_lora(tmp_path / "style.safetensors", style, layout="peft", metadata={"title": "style"})
    return fast, style


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_without_a_rank_the_sum_is_exact(tmp_path: Path, base: Path, to: str) -> None:
    fast, style = fast_and_style(tmp_path)
    out = tmp_path / "out.safetensors"
    files = [(tmp_path / "fast.safetensors", 1.0), (tmp_path / "style.safetensors", -0.6)]
    report = merge_loras(files, out, to=to, base=base)
    loaded = read_lora(out, SHAPES)
    expected = concatenate([fast["unet"], scaled(style["unet"], -0.6)])
    assert_same_delta(loaded.adapters["unet"], expected)
    assert_same_delta(loaded.adapters["text_encoder"], scaled(style["text_encoder"], -0.6))
    assert loaded.report.ranks == (2, 7)
    assert report.share == 1
    assert str(report).startswith(f"{out}: {len(expected) + len(style['text_encoder'])} modules, 100.00%")
    with open_tensors(out) as file:
        kept = {name: file.metadata.get(name) for name in ("hypersd_steps", "ss_base_model_version", "title")}
        assert kept == {"hypersd_steps": "4", "ss_base_model_version": "sd_v1", "title": None}
        assert json.loads(file.metadata["merged_from"]) == ["fast.safetensors@1", "style.safetensors@-0.6"]
    keys = load_file(out)
    assert any(key.startswith("lora_te_" if to == "kohya" else "text_encoder.") for key in keys)


def test_with_a_rank_it_is_the_closest_of_that_rank(tmp_path: Path, base: Path) -> None:
    fast, style = fast_and_style(tmp_path)
    files = [(tmp_path / "fast.safetensors", 0.8), (tmp_path / "style.safetensors", 0.5)]
    report = merge_loras(files, tmp_path / "out.safetensors", rank=3, base=base)
    loaded = read_lora(tmp_path / "out.safetensors", SHAPES)
    whole = concatenate([scaled(fast["unet"], 0.8), scaled(style["unet"], 0.5)])
    assert loaded.report.ranks == (2, 3)
    kept = of = 0.0
    for module, entry in whole.items():
        best = low_rank(delta(entry), 3)
        np.testing.assert_allclose(
            delta(loaded.adapters["unet"][module]), delta(best.entry), rtol=0, atol=1e-5, err_msg=module
        )
        assert report.modules["unet"][module] == pytest.approx((best.kept, best.total), rel=1e-5)
        kept, of = kept + best.kept, of + best.total
    text = report.modules["text_encoder"].values()
    assert all(pair[0] == pytest.approx(pair[1], rel=1e-6) for pair in text)  # of rank 2 already
    assert report.share == pytest.approx((kept + sum(a for a, _ in text)) / (of + sum(b for _, b in text)), rel=1e-5)
    assert 0 < report.worst[1] < report.share < 1


def test_loha_and_lokr_become_a_lora(tmp_path: Path, base: Path) -> None:
    """LoHa of rank 3 has rank 9 at most, so that rank 9 loses nothing; beside it a plain LoRA on the same module."""
    loha, loha_change = kohya_kind(TO_K, "LoHa", 1)
    lokr, lokr_change = kohya_kind(CONV, "LoKr whole pair", 2)
    lora, lora_change = kohya_kind(TO_K, "LoRA", 3)
    save_file(loha | lokr, tmp_path / "a.safetensors")
    save_file(lora, tmp_path / "b.safetensors")
    files = [(tmp_path / "a.safetensors", 0.5), (tmp_path / "b.safetensors", 2.0)]
    report = merge_loras(files, tmp_path / "out.safetensors", rank=12, base=base)
    loaded = read_lora(tmp_path / "out.safetensors", SHAPES)
    assert loaded.differences == {}
    expected = {TO_K: 0.5 * loha_change + 2 * lora_change, CONV: 0.5 * lokr_change}
    for module, change in expected.items():
        found = delta(loaded.adapters["unet"][module])
        np.testing.assert_allclose(found, change, rtol=0, atol=1e-6 * np.abs(change).max() + 1e-6)
    assert report.share == pytest.approx(1, abs=1e-9)


def test_half_precision_stays_where_all_files_have_it(tmp_path: Path, base: Path) -> None:
    for name, dtype in (("a", np.float16), ("b", np.float16), ("c", np.float32)):
        write_lora(tmp_path / f"{name}.safetensors", {"unet": random_adapter(SHAPES["unet"], 0)}, dtype=dtype)
    for other, dtype in (("b", "float16"), ("c", "float32")):
        files = [(tmp_path / "a.safetensors", 1.0), (tmp_path / f"{other}.safetensors", 1.0)]
        merge_loras(files, tmp_path / "out.safetensors", base=base)
        assert read_lora(tmp_path / "out.safetensors", SHAPES).report.dtypes == (dtype,)


def test_dotted_files_need_no_base(tmp_path: Path) -> None:
    """Of a model of no known family, by the shapes that both files spell out."""
    for name, targets in (("a", ("to_q",)), ("b", ("conv1",))):
        adapter = random_adapter(SHAPES["unet"], 0, targets=targets)
        save_file(
            dotted_tensors("unet.", adapter, ".lora_A.weight", ".lora_B.weight"), tmp_path / f"{name}.safetensors"
        )
    merge_loras([(tmp_path / f"{name}.safetensors", 1.0) for name in "ab"], tmp_path / "out.safetensors")
    modules = read_lora(tmp_path / "out.safetensors", SHAPES).adapters["unet"]
    assert modules.keys() == random_adapter(SHAPES["unet"], 0, targets=("to_q", "conv1")).keys()


def test_refusals(tmp_path: Path, base: Path) -> None:
    good, loha, dora, bias, out = (tmp_path / f"{name}.safetensors" for name in ("good", "loha", "dora", "bias", "out"))
    write_lora(good, {"unet": random_adapter(SHAPES["unet"], 0)})
    tensors, _ = kohya_kind(TO_K, "LoHa", 1)
    save_file(tensors, loha)
    lora, _ = kohya_kind(TO_K, "LoRA", 1)
    name = "lora_unet_" + TO_K.replace(".", "_")
    save_file(lora | {f"{name}.dora_scale": np.ones((16, 1), np.float32)}, dora)
    conv = "lora_unet_" + CONV.replace(".", "_")
    width = SHAPES["unet"][f"{CONV}.bias"].shape
    save_file({f"{conv}.diff_b": np.ones(width, np.float32)}, bias)
    for files, options, message in (
        ([], {}, "no LoRA files"),
        ([(good, 1.0)], {"rank": 0}, "rank=0 must be a whole number"),
        ([(good, 1.0)], {"rank": 2.5}, "rank=2.5 must be a whole number"),
        ([(good, float("nan"))], {}, r"good\.safetensors: its scale must be a finite number"),
        ([(good, 1.0)], {"to": "comfy"}, "layout 'comfy'"),
        ([(good, 1.0)], {"to": "kohya-sgm"}, "only SDXL's"),
        ([(good, 1.0), (loha, 1.0)], {}, rf"loha\.safetensors: {TO_K}: .* only with a rank"),
        ([(dora, 1.0)], {"rank": 4}, rf"dora\.safetensors: {TO_K}: DoRA depends on the base"),
        ([(bias, 1.0)], {"rank": 4}, rf"bias\.safetensors: {CONV}: a change of a bias or norm"),
        ([(good, 1.0), (tmp_path / "none.safetensors", 1.0)], {}, r"none\.safetensors: no such file"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            merge_loras(files, out, **{"base": base, **options})
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"good\.safetensors and .*loha\.safetensors: fits none of .* all of them"):
        merge_loras([(good, 1.0), (loha, 1.0)], out)
    assert not out.exists()
