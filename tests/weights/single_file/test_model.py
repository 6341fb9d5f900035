"""Reading single files: what their tensors tell, other programs' spellings, passengers, and refusals by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.models.clip_text import ClipTextConfig
from hypersd_jax.models.unet import UNetConfig
from hypersd_jax.models.vae import VaeConfig
from hypersd_jax.weights import families
from hypersd_jax.weights.components import load_components
from hypersd_jax.weights.single_file import keys, load_single_file, open_single_file
from tests.helpers.single_files import Tensors, passengers, plain_file, plain_model, read_all, rewritten

IN = f"{keys.UNET}input_blocks.0.0.weight"


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    path = tmp_path_factory.mktemp(request.param) / "model.safetensors"
    return request.param, path, plain_file(path, request.param)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("plain")

    def file(kind: str) -> Path:
        path = folder / f"{kind}.safetensors"
        if not path.exists():
            plain_file(path, kind)
        return path

    return file


def scheduler(path: Path, tmp_path: Path, more: Tensors, metadata: dict[str, str] | None = None) -> Any:
    """The scheduler's configuration of a file with a few tensors more."""
    changed = rewritten(path, tmp_path / "changed.safetensors", lambda own: {**own, **more}, metadata=metadata)
    return open_single_file(changed).description.scheduler_config


def test_a_file_without_a_word_in_its_header(plain: tuple[str, Path, Any]) -> None:
    kind, path, params = plain
    assert {key.split(".")[0] for key in read_all(path)} == (
        {"model", "first_stage_model", "conditioner" if kind == "sdxl" else "cond_stage_model"}
    )
    found = load_components(path, dtype=jnp.float32)
    configs = plain_model(kind)
    assert found.unet_config == UNetConfig.from_dict(configs["unet"])
    assert found.vae_config == VaeConfig.from_dict(configs["vae"])
    assert found.is_xl == found.zero_unconditional == (kind == "sdxl")
    assert not found.is_inpainting
    assert found.folder == path
    for name, config in found.description.configs.items():
        if name.startswith("text_encoder"):
            assert ClipTextConfig.from_dict(config) == ClipTextConfig.from_dict(configs[name])
    assert found.params.keys() == params.keys()
    for name, wanted in params.items():
        assert list(found.params[name]) == list(wanted)
        for key, value in wanted.items():
            np.testing.assert_array_equal(found.params[name][key], value, err_msg=f"{name}.{key}")
    assert found.scheduler_config == {
        **families.SCHEDULERS[kind],
        "prediction_type": "v_prediction" if kind == "sd2" else "epsilon",
    }
    assert set(found.description.tokenizers) == ({"tokenizer", "tokenizer_2"} if kind == "sdxl" else {"tokenizer"})


def test_stored_types_are_cast(files: Callable[[str], Path], tmp_path: Path) -> None:
    half = rewritten(
        files("sd1"),
        tmp_path / "half.safetensors",
        lambda own: {key: value.astype(ml_dtypes.bfloat16) for key, value in own.items()},
    )
    whole, found = (load_single_file(path, dtype=jnp.bfloat16) for path in (files("sd1"), half))
    assert all(value.dtype == jnp.bfloat16 for params in found.params.values() for value in params.values())
    np.testing.assert_array_equal(found.params["unet"]["conv_in.kernel"], whole.params["unet"]["conv_in.kernel"])


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_passengers_are_passed_over(files: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    known = {key: value for key, value in passengers().items() if kind == "sd1" or not key.startswith(keys.CLIP)}
    path = rewritten(files(kind), tmp_path / "more.safetensors", lambda own: {**known, **own})
    found = load_single_file(path, dtype=jnp.float32).params
    for name, params in load_single_file(files(kind), dtype=jnp.float32).params.items():
        assert all(np.array_equal(found[name][key], value) for key, value in params.items())


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("sd1", f"{keys.CLIP}text_model.", keys.CLIP),
        ("sdxl", f"{keys.CLIP_XL}text_model.", keys.CLIP_XL),
        ("sd2", keys.OPEN_CLIP, "conditioner.embedders.0.model."),
        ("sd1", ".mid.attn_1.q.", ".mid.attn_1.to_q."),
        ("sd1", ".mid.attn_1.proj_out.", ".mid.attn_1.to_out.0."),
    ],
)
def test_other_spellings(files: Callable[[str], Path], tmp_path: Path, kind: str, old: str, new: str) -> None:
    def renamed(own: Tensors) -> Tensors:
        assert any(old in key for key in own)
        return {key.replace(old, new): value for key, value in own.items()}

    path = rewritten(files(kind), tmp_path / "named.safetensors", renamed)
    found = load_single_file(path, dtype=jnp.float32).params
    for name, params in load_single_file(files(kind), dtype=jnp.float32).params.items():
        assert all(np.array_equal(found[name][key], value) for key, value in params.items())
    with pytest.raises(UserError, match="are the same tensor in two spellings"):
        load_single_file(
            rewritten(path, tmp_path / "twice.safetensors", lambda own: {**own, **read_all(files(kind))}),
            dtype=jnp.float32,
        )


def test_attention_of_the_autoencoder_without_its_window(files: Callable[[str], Path], tmp_path: Path) -> None:
    path = rewritten(
        files("sd1"),
        tmp_path / "flat.safetensors",
        lambda own: {key: value[:, :, 0, 0] if ".attn_1.q.weight" in key else value for key, value in own.items()},
    )
    found, wanted = (load_single_file(file, dtype=jnp.float32).params["vae"] for file in (path, files("sd1")))
    name = "encoder.mid_block.attentions.0.to_q.kernel"
    np.testing.assert_array_equal(found[name], wanted[name])


def test_a_projection_in_the_other_layout(files: Callable[[str], Path], tmp_path: Path) -> None:
    def flipped(own: Tensors) -> Tensors:
        projection = own.pop(f"{keys.OPEN_CLIP_XL}text_projection")
        return {**own, f"{keys.OPEN_CLIP_XL}text_projection.weight": projection.T}

    path = rewritten(files("sdxl"), tmp_path / "flipped.safetensors", flipped)
    found, wanted = (load_single_file(file, dtype=jnp.float32) for file in (path, files("sdxl")))
    assert found.unet_config == wanted.unet_config
    name = "text_projection.kernel"
    assert found.params["text_encoder_2"][name].shape == (64, 16)
    np.testing.assert_array_equal(found.params["text_encoder_2"][name], wanted.params["text_encoder_2"][name])


def test_the_layer_that_sd2_leaves_out(files: Callable[[str], Path], tmp_path: Path) -> None:
    def original(own: Tensors) -> Tensors:
        more = {key.replace("resblocks.1.", "resblocks.2."): value + 1 for key, value in own.items()}
        return {**more, **own, f"{keys.OPEN_CLIP}text_projection": np.ones((64, 64), np.float32)}

    path = rewritten(files("sd2"), tmp_path / "original.safetensors", original)
    found, wanted = (load_single_file(file, dtype=jnp.float32).params["text_encoder"] for file in (path, files("sd2")))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key], value) for key, value in wanted.items())


EMPTY = np.zeros(0, np.float32)


@pytest.mark.parametrize(
    ("kind", "more", "metadata", "wanted"),
    [
        ("sd1", {}, {}, "epsilon"),
        ("sdxl", {}, {"modelspec.prediction_type": "v"}, "v_prediction"),
        ("sd2", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ("sd2", {}, {"modelspec.architecture": "stable-diffusion-v2-512"}, "v_prediction"),
        ("sd2", {"global_step": np.asarray(875000)}, {}, "epsilon"),
        ("sd2", {"global_step": np.asarray(220000)}, {}, "v_prediction"),
        ("sdxl", {"v_pred": EMPTY}, {"modelspec.prediction_type": "epsilon"}, "v_prediction"),
    ],
)
def test_what_the_unet_predicts(
    files: Callable[[str], Path], tmp_path: Path, kind: str, more: Tensors, metadata: dict[str, str], wanted: str
) -> None:
    found = scheduler(files(kind), tmp_path, more, metadata)
    assert found == {**families.SCHEDULERS[kind], "prediction_type": wanted}


def test_sd_turbo_predicts_noise_and_zero_snr_is_said(files: Callable[[str], Path], tmp_path: Path) -> None:
    turbo = rewritten(
        files("sd2"),
        tmp_path / "turbo.safetensors",
        lambda own: {key.replace(keys.OPEN_CLIP, "conditioner.embedders.0.model."): own[key] for key in own},
    )
    assert open_single_file(turbo).description.scheduler_config["prediction_type"] == "epsilon"
    assert open_single_file(turbo).description.configs["unet"]["sample_size"] == 256
    found = scheduler(files("sdxl"), tmp_path, {"v_pred": EMPTY, "ztsnr": EMPTY})
    assert found["rescale_betas_zero_snr"] is True
    assert found["timestep_spacing"] == "trailing"


def test_inpainting(files: Callable[[str], Path], tmp_path: Path) -> None:
    path = rewritten(
        files("sd2"), tmp_path / "nine.safetensors", lambda own: {**own, IN: np.ones((64, 9, 3, 3), np.float32)}
    )
    found = load_single_file(path, dtype=jnp.float32)
    assert found.is_inpainting
    assert found.description.model_index["_class_name"] == "StableDiffusionInpaintPipeline"
    assert found.scheduler_config["prediction_type"] == "epsilon"


def test_configurations_of_the_callers(files: Callable[[str], Path]) -> None:
    given = {
        "unet": {**plain_model("sd1")["unet"], "attention_head_dim": 4},
        "scheduler": {"prediction_type": "sample"},
    }
    found = load_single_file(files("sd1"), dtype=jnp.float32, configs=given)
    assert found.unet_config.heads == (4, 4)
    assert found.scheduler_config == given["scheduler"]
    with pytest.raises(
        UserError,
        match=r"1 ill-fitting \(model\.diffusion_model\.out\.2\.weight \[4, 64, 3, 3\] instead of \[4, 64, 1, 1\]\)$",
    ):
        load_single_file(files("sd1"), dtype=jnp.float32, configs={"unet": {**given["unet"], "conv_out_kernel": 1}})


def without(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda own: {key: value for key, value in own.items() if not key.startswith(prefix)}


def also(**more: np.ndarray) -> Callable[[Tensors], Tensors]:
    return lambda own: {**own, **{key.replace("__", "."): value for key, value in more.items()}}


F32 = np.zeros(3, np.float32)
NAN = np.full((64, 4, 3, 3), np.nan, np.float32)
REFUSALS = {
    "no UNet": ("sd1", without("model."), r"no UNet in it \(model\.diffusion_model\.\*\)"),
    "no autoencoder": ("sd1", without("first_stage_model."), r"holds no autoencoder \(first_stage_model\.\*\)"),
    "no text encoder": ("sd2", without("cond_stage_model."), r"holds no text encoder \(cond_stage_model"),
    "one of two": ("sdxl", without("conditioner.embedders.1."), r"no text encoder conditioner\.embedders\.1\.model"),
    "another": ("sdxl", without("conditioner.embedders.0."), r"no text encoder conditioner\.embedders\.0\.transf"),
    "both kinds": ("sd1", also(cond_stage_model__model__ln_final__weight=F32), r"holds two kinds of text encoder"),
    "other UNet": (
        "sd1",
        lambda own: {"model.diffusion_model.double_blocks.0.img_attn.proj.weight": F32},
        r"its model\.diffusion_model\.\* is not of SD 1\.x, 2\.x or XL",
    ),
    "half a UNet": ("sd1", without(f"{keys.UNET}out."), r"tensor model\.diffusion_model\.out\.2\.weight is missing"),
    "a hole": (
        "sd1",
        without(f"{keys.UNET}middle_block.0.emb_layers"),
        r"2 missing \(model\.diffusion_model\.middle_block\.0\.emb_layers\.1\.bias",
    ),
    "no way into the first transformer": (
        "sd1",
        without(f"{keys.UNET}input_blocks.1.1.proj_in.weight"),
        r"input_blocks\.1\.1\.proj_in\.weight",
    ),
    "a layer of no number": (
        "sd2",
        also(**{f"{keys.OPEN_CLIP}transformer.resblocks.²": F32}),
        r"1 unexpected \(cond_stage_model\.model\.transformer\.resblocks\.²\)$",
    ),
    "no half of the VAE": (
        "sd1",
        without("first_stage_model.encoder."),
        r"first_stage_model\.encoder\.down\.0.* missing",
    ),
    "unknown": ("sd1", also(control_model__x=F32, lora__y=F32), r"2 unexpected \(control_model\.x, lora\.y\)$"),
    "shape": (
        "sd1",
        also(model__diffusion_model__time_embed__2__bias=F32),
        r"1 ill-fitting \(model\.diffusion_model\.time_embed\.2\.bias \[3\] instead of \[256\]\)",
    ),
    "rank": ("sd1", lambda own: {**own, IN: F32}, r"input_blocks\.0\.0\.weight has shape \[3\], not of 4 dimensions"),
    "integers": (
        "sd1",
        lambda own: {**own, IN: np.ones((64, 4, 3, 3), np.int8)},
        r"input_blocks\.0\.0\.weight of type int8",
    ),
    "NaN": (
        "sd1",
        lambda own: {**own, IN: NAN},
        r"tensor model\.diffusion_model\.input_blocks\.0\.0\.weight holds NaN",
    ),
    "edit": ("sd1", lambda own: {**own, IN: np.ones((64, 8, 3, 3), np.float32)}, r"in_channels=8.*InstructPix2Pix"),
    "refiner": (
        "sd2",
        also(model__diffusion_model__label_emb__0__0__weight=np.ones((256, 64), np.float32)),
        r"the SDXL refiner is not supported",
    ),
    "EDM": ("sdxl", also(edm_mean=F32), r"EDM's parametrisation"),
    "vocabulary": (
        "sd1",
        lambda own: {
            key: value[:100] if key.endswith("token_embedding.weight") else value for key, value in own.items()
        },
        r"the text_encoder knows 100 tokens.*CLIP's has 49408",
    ),
    "heads": (
        "sd1",
        lambda own: {
            **own,
            f"{keys.CLIP}text_model.embeddings.token_embedding.weight": np.ones((49408, 40), np.float32),
        },
        r"is 40 wide, so its attention heads are unknown",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(files: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    kind, change, message = REFUSALS[case]
    path = rewritten(files(kind), tmp_path / "bad.safetensors", change)
    with pytest.raises(UserError, match=message) as caught:
        load_components(path, dtype=jnp.float32)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def header(family: str, configs: dict[str, Any] | None = None, **tokenizer: str) -> dict[str, str]:
    """The entry of a file written here, for a pipeline of this family."""
    index = {"_class_name": f"StableDiffusion{family}Pipeline"}
    tokenizers = {"tokenizer": tokenizer} if tokenizer else {}
    return {"hypersd.model": json.dumps({"configs": configs or {}, "model_index": index, "tokenizers": tokenizers})}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"modelspec.prediction_type": "edm"}, r"modelspec\.prediction_type='edm' is not supported"),
        ({"hypersd.model": "[" * 10**5}, r"its header's hypersd\.model is damaged"),
        ({"hypersd.model": "{"}, r"its header's hypersd\.model is damaged"),
        ({"hypersd.model": '{"configs": [], "model_index": {}, "tokenizers": {}}'}, r"hypersd\.model is damaged"),
        (header("", configs={"vae": {"latent_channels": None}}), r"latent_channels=None is not a positive integer"),
        (header("XL"), r"hypersd\.model is of another model"),
        (header("3"), r"hypersd\.model is of another model"),
        (header("", **{"../vocab.json": "{}"}), r"names a tokenizer file outside"),
    ],
)
def test_damaged_headers(files: Callable[[str], Path], tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = rewritten(files("sd1"), tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=message):
        open_single_file(path)


def test_files_that_are_none(files: Callable[[str], Path], tmp_path: Path) -> None:
    content = files("sd1").read_bytes()
    for name, data, message in (
        ("cut.safetensors", content[: len(content) // 2], "is truncated: it has"),
        ("old.ckpt", b"PK\x03\x04", "pickled weights are not read"),
        ("renamed.safetensors", b"PK\x03\x04" + bytes(100), "pickled weights are not read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            load_components(tmp_path / name, dtype=jnp.float32)
        assert name in str(caught.value)
