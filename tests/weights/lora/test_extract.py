"""The LoRA between two models: exact where the change has its rank, else the closest; what it cannot hold is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hypersd_jax.adapters import TARGETS_14, delta, target_paths
from hypersd_jax.errors import UserError
from hypersd_jax.weights import read_lora
from hypersd_jax.weights.conversion import convert_model
from hypersd_jax.weights.families import adaptable_shapes
from hypersd_jax.weights.lora.extract import TEXT_TARGETS, extract_lora
from tests.helpers.lora_files import random_adapter
from tests.helpers.tiny_model import TEXT, UNET, tiny_model

SHAPES = adaptable_shapes({"unet": UNET, "text_encoder": TEXT})
STEMS = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
Change = Callable[[dict[str, np.ndarray]], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("extract") / "base")


def tuned(base: Path, to: Path, changes: dict[str, Change]) -> Path:
    """A copy of the base with some components' stored tensors changed in place."""
    shutil.copytree(base, to)
    for component, change in changes.items():
        file = to / component / f"{STEMS[component]}.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    return to


def adding(component: str, seed: int, rank: int, targets: tuple[str, ...]) -> Change:
    adapter = random_adapter(SHAPES[component], seed, rank=rank, targets=targets)

    def change(tensors: dict[str, np.ndarray]) -> None:
        for path, entry in adapter.items():
            value = np.asarray(delta({name: np.asarray(leaf) for name, leaf in entry.items()}))
            tensors[f"{path}.weight"] += value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T

    return change


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_a_lora_merged_into_the_weights_comes_out_again(tmp_path: Path, base: Path, to: str) -> None:
    adapted = (("unet", TARGETS_14), ("text_encoder", ("fc1",)))
    changes = {component: adding(component, 1, 3, targets) for component, targets in adapted}
    folder = tuned(base, tmp_path / "tuned", changes)
    report = extract_lora(base, folder, tmp_path / "out.safetensors", rank=3, to=to)
    loaded = read_lora(tmp_path / "out.safetensors", SHAPES)
    for component, targets in adapted:
        expected = random_adapter(SHAPES[component], 1, rank=3, targets=targets)
        assert loaded.adapters[component].keys() == expected.keys()
        for path, entry in expected.items():
            whole = np.asarray(delta({name: np.asarray(leaf) for name, leaf in entry.items()}))
            found = delta({name: np.asarray(leaf) for name, leaf in loaded.adapters[component][path].items()})
            np.testing.assert_allclose(found, whole, rtol=0, atol=2e-6 * np.abs(whole).max() + 2e-7, err_msg=path)
    assert loaded.report.ranks == (3, 3)
    assert report.share == pytest.approx(1, abs=1e-9)
    assert report.left_out == ()


def test_of_a_smaller_rank_it_is_the_closest(tmp_path: Path, base: Path) -> None:
    folder = tuned(base, tmp_path / "tuned", {"unet": adding("unet", 2, 6, ("to_q", "conv2"))})
    report = extract_lora(base, folder, tmp_path / "out.safetensors", rank=2)
    loaded = read_lora(tmp_path / "out.safetensors", SHAPES).adapters["unet"]
    first, second = (load_file(source / "unet" / f"{STEMS['unet']}.safetensors") for source in (base, folder))
    kept = of = 0.0
    for path, entry in loaded.items():
        change = (second[f"{path}.weight"] - first[f"{path}.weight"]).astype(np.float64)
        values = np.linalg.svd(change.transpose(0, 2, 3, 1).reshape(len(change), -1) if change.ndim == 4 else change)[1]
        found = np.asarray(delta({name: np.asarray(leaf) for name, leaf in entry.items()}), np.float64)
        error = np.linalg.norm(found - (change.transpose(2, 3, 1, 0) if change.ndim == 4 else change.T))
        assert error == pytest.approx(np.linalg.norm(values[2:]), rel=1e-4)
        assert report.modules["unet"][path] == pytest.approx((np.sum(values[:2] ** 2), np.sum(values**2)), rel=1e-5)
        kept, of = kept + np.sum(values[:2] ** 2), of + np.sum(values**2)
    assert report.share == pytest.approx(kept / of, rel=1e-5)
    assert f"{report.share:.2%} of the squared change kept (least" in str(report)


def test_what_no_lora_holds_is_named(tmp_path: Path, base: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        adding("unet", 3, 1, ("to_q",))(tensors)
        tensors["conv_in.weight"] += 0.1
        tensors["mid_block.resnets.0.norm1.weight"] += 0.1

    folder = tuned(base, tmp_path / "tuned", {"unet": change})
    report = extract_lora(base, folder, tmp_path / "out.safetensors", rank=1, dtype=np.float16)
    assert set(report.left_out) == {"unet.conv_in.weight", "unet.mid_block.resnets.0.norm1.weight"}
    assert "left out: unet." in str(report)
    loaded = read_lora(tmp_path / "out.safetensors", SHAPES)
    assert loaded.adapters.keys() == {"unet"}
    assert loaded.adapters["unet"].keys() == set(target_paths(SHAPES["unet"], ("to_q",)))
    assert loaded.report.dtypes == ("float16",)


def test_the_text_targets_are_all_of_a_layer_s_linears() -> None:
    linears = {path.removesuffix(".kernel") for path in SHAPES["text_encoder"] if path.endswith(".kernel")}
    assert set(target_paths(SHAPES["text_encoder"], TEXT_TARGETS)) == linears


def test_refusals(tmp_path: Path, base: Path) -> None:
    def nan(tensors: dict[str, np.ndarray]) -> None:
        tensors["conv_in.weight"][0, 0, 0, 0] = np.nan

    def norm_only(tensors: dict[str, np.ndarray]) -> None:
        tensors["conv_norm_out.weight"] += 1

    broken = tuned(base, tmp_path / "nan", {"unet": nan})
    norms = tuned(base, tmp_path / "norms", {"unet": norm_only})
    lost = tuned(base, tmp_path / "lost", {"unet": lambda tensors: tensors.pop("conv_in.bias")})
    wide = tuned(base, tmp_path / "wide", {})
    (wide / "unet" / "config.json").write_text(json.dumps({**UNET, "block_out_channels": [24]}))
    out = tmp_path / "out.safetensors"
    for source, options, message in (
        (base, {"rank": 4}, "does not differ from .* in any module"),
        (norms, {"rank": 4}, r"any module that a LoRA adapts, only in unet\.conv_norm_out\.weight"),
        (broken, {"rank": 4}, r"conv_in\.weight holds NaN"),
        (lost, {"rank": 4}, r"1 missing \(conv_in\.bias\)"),
        (wide, {"rank": 4}, r"wide: unet\.conv_in\.bias is \(24,\), but \(16,\) in "),
        (tmp_path / "none", {"rank": 4}, "none: no such"),
        (norms, {"rank": 0}, "rank=0"),
        (norms, {"rank": 4, "to": "diff"}, "layout 'diff'"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            extract_lora(base, source, out, **options)
        assert "\n" not in str(raised.value)
    assert not out.exists()


@pytest.mark.filterwarnings("ignore:.*only this package")
def test_a_single_file_is_a_model_too(tmp_path: Path, base: Path) -> None:
    folder = tuned(base, tmp_path / "tuned", {"unet": adding("unet", 4, 2, ("to_q",))})
    convert_model(folder, tmp_path / "tuned.safetensors", "single-file")
    for source, name in ((folder, "a"), (tmp_path / "tuned.safetensors", "b")):
        extract_lora(base, source, tmp_path / f"{name}.safetensors", rank=2)
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(second[key], value)
