"""A LoRA file is used whole or refused in one line that names the file and a key."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hypersd_jax.errors import UserError
from hypersd_jax.weights import read_lora, write_lora
from hypersd_jax.weights.families import adaptable_shapes
from tests.helpers.configs import TINY
from tests.helpers.lora_files import dotted_tensors, kohya_tensors, random_adapter

SHAPES = adaptable_shapes(TINY)
ADAPTER = random_adapter(SHAPES["unet"], 0, targets=("attn1.to_q", "attn2.to_k", "conv1"))
BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
TO_Q, TO_K = f"{BLOCK}_attn1_to_q", f"{BLOCK}_attn2_to_k"

Tensors = dict[str, np.ndarray]


def without(tensors: Tensors, key: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name != key}


def changed(tensors: Tensors, key: str, change: Callable[[np.ndarray], np.ndarray]) -> Tensors:
    return {**tensors, key: np.ascontiguousarray(change(tensors[key]))}


def not_a_number(value: np.ndarray) -> np.ndarray:
    value = value.copy()
    value.flat[3] = np.nan
    return value


GOOD = kohya_tensors("lora_unet_", ADAPTER, 4.0)
PEFT = dotted_tensors("unet.", ADAPTER, ".lora_A.weight", ".lora_B.weight")
ONE = np.ones((4, 4), np.float32)

BAD: dict[str, tuple[Tensors, str]] = {
    "no up factor": (without(GOOD, f"{TO_Q}.lora_up.weight"), rf"factor is missing beside {TO_Q}"),
    "no down factor": (without(GOOD, f"{TO_Q}.lora_down.weight"), rf"factor is missing beside {TO_Q}"),
    "alpha alone": ({f"{TO_Q}.alpha": np.float32(4)}, rf"factor is missing beside {TO_Q}.alpha"),
    "half a PEFT pair": (dict(list(PEFT.items())[:1]), r"factor is missing beside unet\..*lora_A"),
    "unknown module": ({**GOOD, "lora_unet_nowhere.lora_down.weight": ONE}, "no such module.*lora_unet_nowhere"),
    "unknown dotted module": ({**PEFT, "unet.nowhere.lora_A.weight": ONE}, r"no such module.*unet\.nowhere"),
    "second text encoder": ({"lora_te2_text_model_x.lora_up.weight": ONE}, "no such module.*lora_te2_text_model_x"),
    "unknown suffix": ({**GOOD, f"{TO_Q}.strange": ONE}, rf"no such module.*{TO_Q}\.strange"),
    "norm of the base": ({"unet.conv_norm_out.lora_A.weight": ONE}, r"no such module.*conv_norm_out"),
    "wrong width": (changed(GOOD, f"{TO_Q}.lora_down.weight", lambda v: v[:, :-1]), rf"do not fit.*{TO_Q}.*\(4, 7\)"),
    "ranks disagree": (changed(GOOD, f"{TO_Q}.lora_up.weight", lambda v: v[:, :-1]), rf"do not fit.*{TO_Q}"),
    "rank 0": (changed(GOOD, f"{TO_Q}.lora_down.weight", lambda v: v[:0]), rf"do not fit.*{TO_Q}"),
    "one-dimensional": (changed(GOOD, f"{TO_Q}.lora_down.weight", lambda v: v[0]), rf"do not fit.*{TO_Q}"),
    "a scalar for a factor": (changed(GOOD, f"{TO_K}.lora_down.weight", lambda v: v[0, 0]), rf"do not fit.*{TO_K}"),
    "NaN": (changed(GOOD, f"{TO_Q}.lora_up.weight", not_a_number), rf"NaN.*{TO_Q}\.lora_up"),
    "infinite": (changed(GOOD, f"{TO_Q}.lora_down.weight", lambda v: v + np.inf), rf"infinite.*{TO_Q}\.lora_down"),
    "alpha is a vector": ({**GOOD, f"{TO_Q}.alpha": np.ones(4, np.float32)}, rf"{TO_Q}\.alpha is not one"),
    "alpha is NaN": ({**GOOD, f"{TO_Q}.alpha": np.float32("nan")}, rf"{TO_Q}\.alpha is not one"),
    "too large for float32": (
        changed(GOOD, f"{TO_Q}.lora_up.weight", lambda v: v.astype(np.float64) + 1e300),
        rf"infinite.*{TO_Q}\.lora_up",
    ),
    "LoKr with a factor of three axes": (
        {f"{TO_Q}.lokr_w1": np.ones((2, 2, 1), np.float32), f"{TO_Q}.lokr_w2": ONE},
        rf"do not fit.*{TO_Q}",
    ),
    "LoKr of rank 0": (
        {
            f"{TO_Q}.lokr_w1": np.ones((2, 2), np.float32),
            f"{TO_Q}.lokr_w2_a": np.ones((4, 0), np.float32),
            f"{TO_Q}.lokr_w2_b": np.ones((0, 4), np.float32),
        },
        rf"do not fit.*{TO_Q}",
    ),
    "both layouts for one module": ({**GOOD, **PEFT}, "are both for unet"),
    "a model": ({"model.diffusion_model.out.2.weight": ONE}, "is not a LoRA file: model.diffusion_model"),
    "empty": ({}, "is not a LoRA file: it holds no tensors"),
    "GLoRA": ({f"{TO_Q}.a1.weight": ONE}, rf"GLoRA.*{TO_Q}\.a1\.weight"),
    "OFT": ({f"{TO_Q}.oft_blocks": ONE}, rf"OFT.*{TO_Q}\.oft_blocks"),
    "a whole weight": ({f"{TO_Q}.set_weight": ONE}, rf"set_weight.*{TO_Q}\.set_weight"),
    "a magnitude of no LoRA": (
        {**PEFT, "unet.conv_in.lora_magnitude_vector": ONE},
        r"factor is missing beside unet\.conv_in\.lora_magnitude_vector",
    ),
    "sgm names of another model": (
        {"lora_unet_input_blocks_44_1_proj_in.lora_up.weight": ONE},
        "no such module.*input_blocks_44_1",
    ),
    "FLUX by ComfyUI": (
        {"diffusion_model.double_blocks.0.img_mod.lin.lora_up.weight": ONE},
        r"transformer model's LoRA.*double_blocks",
    ),
    "FLUX": ({"transformer.single.lora_A.weight": ONE}, r"transformer model's LoRA.*transformer\.single"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_tensors_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    tensors, message = BAD[kind]
    path = tmp_path / "bad.safetensors"
    save_file({key: np.asarray(value) for key, value in tensors.items()}, path)
    with np.errstate(all="ignore"), pytest.raises(UserError, match=message) as raised:
        read_lora(path, SHAPES)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_long_lists_are_cut(tmp_path: Path) -> None:
    tensors = {f"lora_unet_nowhere_{i}.lora_down.weight": ONE for i in range(9)}
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"nowhere_0.*nowhere_1.*nowhere_2.* and 6 others$"):
        read_lora(tmp_path / "bad.safetensors", SHAPES)


def test_a_lora_of_another_family_is_told_by_its_width(tmp_path: Path) -> None:
    wide = adaptable_shapes({"unet": {**TINY["unet"], "cross_attention_dim": 24}})
    write_lora(tmp_path / "wide.safetensors", {"unet": random_adapter(wide["unet"], 0)})
    with pytest.raises(UserError, match="for a model with cross-attention width 24, this one has 16"):
        read_lora(tmp_path / "wide.safetensors", SHAPES)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "lora_adapter_metadata: is not JSON"),
        ("[1]", "lora_adapter_metadata: is not a JSON object"),
        (json.dumps({"unet.r": 8}), r"stored rank is 4.*configuration says 8"),
        (json.dumps({"unet.r": 4, "unet.lora_alpha": "much"}), "lora_alpha is 'much'"),
        ("[" * 10**5, "lora_adapter_metadata: is not JSON"),
        (json.dumps({"unet.r": 4, "unet.lora_alpha": 10**400}), "lora_alpha is 1000"),
        (json.dumps({"unet.r": 4, "unet.lora_alpha": 1e300}), r"lora_alpha is 1e\+300, not a finite number"),
        (json.dumps({"unet.r": 4, "unet.rank_pattern": [4]}), r"rank_pattern is \[4\], not an object"),
        (json.dumps({"unet.r": 4, "unet.rank_pattern": {"(.+)+!": 4}}), "rank_pattern holds .* for ever to match"),
        (json.dumps({"unet.r": 4, "unet.use_dora": True}), r"attn.*says DoRA, but it has no lora_magnitude_vector"),
        (json.dumps({"unet.r": 4, "unet.peft_type": "LOHA"}), "peft_type LOHA"),
    ],
)
def test_bad_peft_configurations(tmp_path: Path, metadata: str, message: str) -> None:
    save_file(PEFT, tmp_path / "bad.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "bad.safetensors", SHAPES)


def test_a_configuration_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(PEFT, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    read_lora(tmp_path / "a.safetensors", SHAPES)

    def denied(*_: Any, **__: Any) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", denied)  # root may read whatever the mode says
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read \(Permission denied\)$"):
        read_lora(tmp_path / "a.safetensors", SHAPES)


def test_bad_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_lora(tmp_path / "none.safetensors", SHAPES)
    (tmp_path / "a.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="pickle"):
        read_lora(tmp_path / "a.bin", SHAPES)
    with pytest.raises(UserError, match="this one holds 0"):
        read_lora(tmp_path, SHAPES)
    save_file(GOOD, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated"):
        read_lora(tmp_path / "cut.safetensors", SHAPES)
    with pytest.raises(UserError, match="this one holds 2"):
        read_lora(tmp_path, SHAPES)


def test_bad_writes_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="layout 'comfy'"):
        write_lora(path, {"unet": ADAPTER}, layout="comfy")
    for adapters in ({}, {"unet": {}}, {"vae": ADAPTER}):
        with pytest.raises(UserError, match="nothing to write"):
            write_lora(path, adapters)
    name, entry = next(iter(ADAPTER.items()))
    with pytest.raises(UserError, match=rf"a\.safetensors: {name}: .*too large for float16"):
        write_lora(path, {"unet": {name: {**entry, "up": entry["up"] + 7e4}}}, dtype=np.float16)
    assert not path.exists()
