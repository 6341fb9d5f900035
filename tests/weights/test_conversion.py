"""Whole models from one layout into another, LoRAs merged on the way."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.weights import conversion, open_tensors, read_lora, write_lora
from hypersd_jax.weights.components import load_components
from hypersd_jax.weights.conversion import convert_model
from hypersd_jax.weights.diffusers.model import save_model
from hypersd_jax.weights.single_file import save_single_file
from hypersd_jax.weights.single_file.configs import Generation
from hypersd_jax.weights.tensors import save_tensors
from tests.helpers.lora_files import random_adapter
from tests.helpers.single_files import plain_file, read_all, rewritten
from tests.helpers.tiny_model import tiny_model

NOTE = "only this package reads these from the file"
pytestmark = pytest.mark.filterwarnings(f"ignore:.*{NOTE}")

KERNEL = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
MODULE = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "v_prediction")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    plain_file(path, "sdxl")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_and_back_is_the_same_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"{NOTE}.*: unet\.config, vae\.config, text_encoder\.config, tokenizer \("):
        convert_model(folder, tmp_path / "one.safetensors", "single-file")
    convert_model(tmp_path / "one.safetensors", tmp_path / "two", "diffusers")
    convert_model(folder, tmp_path / "three", "diffusers")
    assert contents(tmp_path / "two") == contents(tmp_path / "three")
    convert_model(tmp_path / "two", tmp_path / "four.safetensors", "single-file")
    one, four = (open_tensors(tmp_path / f"{name}.safetensors") for name in ("one", "four"))
    assert one.keys() == four.keys()
    assert {**one.metadata, "modelspec.title": "two"} == four.metadata
    first, again = read_all(one.path), read_all(four.path)
    assert all(np.array_equal(again[key], value) for key, value in first.items())
    assert {path.name for path in tmp_path.iterdir()} == {"one.safetensors", "two", "three", "four.safetensors"}


def test_what_other_programs_cannot_know_is_said(plain: Path, tmp_path: Path) -> None:
    convert_model(plain, tmp_path / "xl", "diffusers")
    for name, change in (
        ("unet/config.json", {"attention_head_dim": [2, 4]}),
        ("vae/config.json", {"scaling_factor": 0.5}),
        ("scheduler/scheduler_config.json", {"beta_start": 0.0001}),
    ):
        file = tmp_path / "xl" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.warns(UserWarning, match=rf"{NOTE}.*: unet\.heads, vae\.scaling_factor, scheduler\.beta_start$"):
        convert_model(tmp_path / "xl", tmp_path / "xl.safetensors", "single-file")
    found = load_components(tmp_path / "xl.safetensors", dtype=jnp.float32)
    assert found.unet_config.heads == (2, 4)
    assert found.vae_config.scaling_factor == 0.5
    assert found.scheduler_config["beta_start"] == 0.0001


@pytest.mark.filterwarnings("error")
def test_a_model_of_a_family_needs_no_note(plain: Path, tmp_path: Path) -> None:
    convert_model(plain, tmp_path / "xl.safetensors", "single-file")
    assert read_all(tmp_path / "xl.safetensors").keys() == read_all(plain).keys()


def test_what_the_header_says_to_other_programs(folder: Path, plain: Path, tmp_path: Path) -> None:
    convert_model(folder, tmp_path / "v.safetensors", "single-file")
    convert_model(plain, tmp_path / "xl.safetensors", "single-file")
    v, xl = (open_tensors(tmp_path / f"{name}.safetensors") for name in ("v", "xl"))
    assert v.metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert v.metadata["modelspec.prediction_type"] == "v"
    assert v.metadata["modelspec.resolution"] == "16x16"
    assert "v_pred" in v.keys()  # noqa: SIM118 - not a mapping
    assert xl.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert xl.metadata["modelspec.prediction_type"] == "epsilon"
    assert "v_pred" not in xl.keys()  # noqa: SIM118 - not a mapping
    assert json.loads(xl.metadata["hypersd.model"])["tokenizers"] == {}


def test_a_file_of_another_program_becomes_a_folder(plain: Path, tmp_path: Path) -> None:
    convert_model(plain, tmp_path / "xl", "diffusers")
    names = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
    assert {path.name for path in (tmp_path / "xl").iterdir()} == {*names, "model_index.json"}
    index = json.loads((tmp_path / "xl" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    for tokenizer, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        assert json.loads((tmp_path / "xl" / tokenizer / "tokenizer_config.json").read_text())["pad_token"] == pad
    convert_model(tmp_path / "xl", tmp_path / "again.safetensors", "single-file")
    first, again = read_all(plain), read_all(tmp_path / "again.safetensors")
    assert first.keys() == again.keys()
    assert all(np.array_equal(again[key], value) for key, value in first.items())


def test_types_are_kept_and_chosen(folder: Path, tmp_path: Path) -> None:
    convert_model(folder, tmp_path / "half.safetensors", "single-file", dtype=ml_dtypes.bfloat16)
    mixed = rewritten(
        tmp_path / "half.safetensors",
        tmp_path / "mixed.safetensors",
        lambda own: {key: value.astype(np.float32) if "first_stage" in key else value for key, value in own.items()},
    )
    convert_model(mixed, tmp_path / "kept", "diffusers")
    convert_model(mixed, tmp_path / "f16", "diffusers", dtype=np.float16)
    for name, kept in (("unet", "bfloat16"), ("vae", "float32")):
        for result, wanted in (("kept", kept), ("f16", "float16")):
            (file,) = (tmp_path / result / name).glob("*.safetensors")
            assert {value.dtype.name for value in read_all(file).values()} == {wanted}


@pytest.mark.parametrize("dtype", [None, np.float16])
def test_loras_are_summed_in_float32_and_rounded_once(folder: Path, tmp_path: Path, dtype: type | None) -> None:
    convert_model(folder, tmp_path / "half.safetensors", "single-file", dtype=ml_dtypes.bfloat16)
    shapes = load_components(folder, dtype=jnp.float32).shapes
    loras = []
    for seed, scale in ((0, 0.7), (1, -1.3)):
        file = tmp_path / f"{seed}.safetensors"
        write_lora(file, {"unet": random_adapter(shapes["unet"], seed, targets=("resnets.0.conv1",))})
        loras.append((file, scale))
    convert_model(tmp_path / "half.safetensors", tmp_path / "m.safetensors", "single-file", loras=loras, dtype=dtype)
    before, found = read_all(tmp_path / "half.safetensors"), read_all(tmp_path / "m.safetensors")
    total = before[KERNEL].astype(np.float64)
    for file, scale in loras:
        entry = read_lora(file, shapes).adapters["unet"][MODULE]
        delta = entry["down"].astype(np.float64) * entry["scale"] @ entry["up"].astype(np.float64)
        total += scale * delta.transpose(3, 2, 0, 1)
    wanted = ml_dtypes.bfloat16 if dtype is None else dtype
    assert found[KERNEL].dtype == wanted
    # Float32 sums may round to the neighbour of what float64 sums round to, and hardly ever do.
    off = found[KERNEL].astype(np.float64) - total.astype(wanted).astype(np.float64)
    assert (off != 0).mean() < 1e-3
    assert np.abs(off).max() <= 2.0**-7 * np.abs(total).max()
    changed = {key for key in found if not np.array_equal(found[key], before[key].astype(found[key].dtype))}
    assert KERNEL in changed
    assert all(".in_layers.2.weight" in key for key in changed)


def test_full_differences_and_biases_are_merged(folder: Path, tmp_path: Path) -> None:
    convert_model(folder, tmp_path / "base.safetensors", "single-file")
    before = read_all(tmp_path / "base.safetensors")
    rng = np.random.default_rng(0)
    bias = KERNEL.replace("weight", "bias")
    deltas = {key: rng.standard_normal(before[key].shape).astype(np.float32) for key in (KERNEL, bias)}
    name = f"lora_unet_{MODULE.replace('.', '_')}"
    save_tensors(tmp_path / "full.safetensors", {f"{name}.diff": deltas[KERNEL], f"{name}.diff_b": deltas[bias]})
    convert_model(folder, tmp_path / "m.safetensors", "single-file", loras=[(tmp_path / "full.safetensors", 0.5)])
    found = read_all(tmp_path / "m.safetensors")
    for key, value in before.items():
        wanted = value + 0.5 * deltas[key] if key in deltas else value
        np.testing.assert_allclose(found[key], wanted, rtol=1e-6, atol=1e-6, err_msg=key)


def test_loaded_models_are_written_too(plain: Path, tmp_path: Path) -> None:
    components = load_components(plain, dtype=jnp.bfloat16)
    save_single_file(components, tmp_path / "one.safetensors")
    save_model(components, tmp_path / "folder")
    shifted = {**components.params, "vae": {key: value + 1 for key, value in components.params["vae"].items()}}
    save_single_file(components, tmp_path / "two.safetensors", params=shifted, dtype=np.float32)
    one, two = read_all(tmp_path / "one.safetensors"), read_all(tmp_path / "two.safetensors")
    assert {value.dtype.name for value in one.values()} == {"bfloat16"}
    assert {value.dtype.name for value in two.values()} == {"float32"}
    for key, value in one.items():
        wanted = (value + 1 if key.startswith("first_stage_model.") else value).astype(np.float32)
        np.testing.assert_array_equal(two[key], wanted, err_msg=key)
    again = load_components(tmp_path / "folder", dtype=jnp.bfloat16)
    for name, params in components.params.items():
        assert all(np.array_equal(again.params[name][key], value) for key, value in params.items())


def test_refusals_leave_nothing_behind(folder: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    bad = rewritten(
        plain,
        tmp_path / "bad.safetensors",
        lambda own: {**own, "model.diffusion_model.out.0.bias": np.full(64, np.nan)},
    )
    lora = tmp_path / "lora.safetensors"
    save_tensors(lora, {"lora_unet_mid_block_resnets_7_conv1.lora_down.weight": np.ones((1, 1), np.float32)})
    big = rewritten(
        plain, tmp_path / "big.safetensors", lambda own: {**own, "model.diffusion_model.out.0.bias": np.full(64, 1e6)}
    )
    before = {path.name for path in tmp_path.iterdir()}
    new, file = tmp_path / "new", tmp_path / "new.safetensors"
    for source, target, to, more, message in (
        (folder, new, "comfy", {}, r"model layout 'comfy': choose one of diffusers, single-file"),
        (folder, tmp_path / "mine", "diffusers", {}, r"mine: exists already"),
        (folder, tmp_path / "new.ckpt", "single-file", {}, r"new\.ckpt: name a file that ends in \.safetensors"),
        (folder, tmp_path / "mine" / "notes.txt" / "x.safetensors", "single-file", {}, r"cannot be written"),
        (tmp_path / "none", new, "diffusers", {}, r"none: no such file or folder"),
        (tmp_path / "mine", new, "diffusers", {}, r"mine: not a diffusers model folder"),
        (bad, new, "diffusers", {}, r"bad\.safetensors: tensor model\.diffusion_model\.out\.0\.bias holds NaN"),
        (bad, file, "single-file", {}, r"bad\.safetensors: tensor model\.diffusion_model\.out\.0\.bias holds NaN"),
        (big, new, "diffusers", {"dtype": np.float16}, r"tensor conv_norm_out\.bias does not fit into float16"),
        (big, file, "single-file", {"dtype": np.float16}, r"tensor model\.diffusion_model\.out\.0\.bias does not fit"),
        (folder, new, "diffusers", {"loras": [(lora, 1.0)]}, r"lora\.safetensors: "),
        (folder, new, "diffusers", {"loras": [(lora, float("nan"))]}, r"lora\.safetensors.*must be a finite number"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            convert_model(source, target, to, **more)
        assert "\n" not in str(caught.value)
        assert {path.name for path in tmp_path.iterdir()} == before, message
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_unet_that_reads_the_guidance_scale(plain: Path, tmp_path: Path) -> None:
    key = "model.diffusion_model.time_embedding.cond_proj.weight"
    lcm = rewritten(
        plain, tmp_path / "lcm.safetensors", lambda own: {**own, key: np.ones((64, 8), np.float32)}, metadata={}
    )
    found = load_components(lcm, dtype=jnp.float32)
    assert found.unet_config.time_cond_proj_dim == 8
    assert found.params["unet"]["time_embedding.cond_proj.kernel"].shape == (8, 64)
    with pytest.warns(UserWarning, match=rf"{NOTE}.*: unet\.time_cond_proj_dim$"):
        convert_model(lcm, tmp_path / "again.safetensors", "single-file")
    assert read_all(tmp_path / "again.safetensors").keys() == read_all(lcm).keys()


def test_loras_by_hub_id(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cached.safetensors"
    write_lora(file, {"unet": random_adapter(load_components(folder, dtype=jnp.float32).shapes["unet"], 0)})
    asked: list[str] = []
    monkeypatch.setattr(conversion, "fetch_lora", lambda source: asked.append(source) or file)
    for name, source in (("hub", "owner/name@main"), ("local", file)):
        convert_model(folder, tmp_path / f"{name}.safetensors", "single-file", loras=[(source, 0.5)])
    assert asked == ["owner/name@main", file]
    hub, local = (read_all(tmp_path / f"{name}.safetensors") for name in ("hub", "local"))
    assert hub.keys() == local.keys()
    assert all(np.array_equal(hub[key], value) for key, value in local.items())


@pytest.mark.parametrize(
    ("kind", "inpaints", "untold"),
    [
        ("sd1", False, {"sample"}),
        ("sdxl", False, {"sample"}),
        ("sd2", False, {"sample", "epsilon"}),
        ("sd2", True, {"sample", "v_prediction"}),
    ],
)
def test_a_prediction_that_other_programs_guess_wrong(
    tmp_path: Path, kind: Generation, inpaints: bool, untold: set[str]
) -> None:
    file, model = tmp_path / "plain.safetensors", tmp_path / "model"
    plain_file(file, kind)
    if inpaints:
        key = "model.diffusion_model.input_blocks.0.0.weight"
        rewritten(file, file, lambda own: {**own, key: np.ones((64, 9, 3, 3), np.float32)})
    convert_model(file, model, "diffusers")
    scheduler = model / "scheduler" / "scheduler_config.json"
    for prediction in ("epsilon", "v_prediction", "sample"):
        scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": prediction}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            convert_model(model, tmp_path / "again.safetensors", "single-file")
        said = [str(warning.message) for warning in caught if NOTE in str(warning.message)]
        assert [text.endswith(": scheduler.prediction_type") for text in said] == [True] * (prediction in untold)
