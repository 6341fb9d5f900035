"""Single files against diffusers: what is written here its converters take apart, to the same tensors and images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers.loaders import single_file_utils as theirs_utils
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hypersd_jax.models.functional import Network
from hypersd_jax.weights import families, write_lora
from hypersd_jax.weights.components import load_components
from hypersd_jax.weights.conversion import convert_model
from tests.helpers.lora_files import TEXT_TARGETS, random_adapter
from tests.helpers.tiny_pipelines import tiny_sd, tiny_sdxl
from tests.helpers.torch_weights import perturb, relative_error
from tests.weights.single_file.test_keys import KINDS, VAE_CONFIG, layout

# A tiny model is no model of its family; the note that says so has its test elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:.*only this package reads these from the file")

PROMPTS = ["red apple, fluent flat style", "a cat face, noto style, blue background"]
SCALE = 0.7
TOLERANCE = 1e-5
"""Relative L2 error of float32 weights with LoRAs in them, and of images sampled with them."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline of diffusers', its folder, and the file that is written here of it."""

    pipe: Any
    folder: Path
    file: Path


def _inpainting(folder: Path) -> Path:
    """The SD-1.x-shaped pipeline with nine input channels."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd(folder / "plain", attentive=True))
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9})
    parts = {**pipe.components, "unet": perturb(unet, 2, 0.05)}
    parts.pop("image_encoder")
    diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(folder / "nine")
    return folder / "nine"


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl", "inpainting"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp(request.param)
    folder = {
        "sd1": lambda: tiny_sd(path / "model", attentive=True),
        "sd2": lambda: tiny_sd(path / "model", "v_prediction", attentive=True),
        "sdxl": lambda: tiny_sdxl(path / "model", attentive=True),
        "inpainting": lambda: _inpainting(path),
    }[request.param]()
    convert_model(folder, path / "model.safetensors", "single-file")
    return Model(pipe=_pipeline(folder), folder=folder, file=path / "model.safetensors")


def _pipeline(folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _texts(pipe: Any) -> dict[str, Any]:
    return {name: part for name in ("text_encoder", "text_encoder_2") if (part := getattr(pipe, name, None))}


def _taken_apart(stored: dict[str, Any], pipe: Any) -> dict[str, dict[str, Any]]:
    """The file's tensors by component, as diffusers' converters of single files have them."""
    prefix = "conditioner.embedders.1.model." if hasattr(pipe, "text_encoder_2") else "cond_stage_model.model."
    parts = {
        "unet": theirs_utils.convert_ldm_unet_checkpoint(dict(stored), pipe.unet.config),
        "vae": theirs_utils.convert_ldm_vae_checkpoint(dict(stored), pipe.vae.config),
    }
    for name, encoder in _texts(pipe).items():
        if encoder.config.hidden_act == "gelu":
            parts[name] = theirs_utils.convert_open_clip_checkpoint(encoder, dict(stored), prefix=prefix)
        else:
            parts[name] = theirs_utils.convert_ldm_clip_checkpoint(dict(stored))
    return parts


def _state(module: Any) -> dict[str, Any]:
    return {_bare(key): value for key, value in module.state_dict().items() if not key.endswith("position_ids")}


def _bare(key: str) -> str:
    """Without the prefix that transformers 5 dropped from CLIPTextModel."""
    return key.removeprefix("text_model.")


def _networks(components: Any) -> dict[str, Network]:
    return {"unet": components.unet, "vae": components.vae, **components.text_encoders}


def _assert_same_params(ours: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert ours.keys() == wanted.keys()
    for name, params in wanted.items():
        assert ours[name].keys() == params.keys()
        for path, value in params.items():
            np.testing.assert_array_equal(np.asarray(ours[name][path]), np.asarray(value), err_msg=f"{name}.{path}")


def test_their_converters_find_every_tensor(model: Model) -> None:
    for name, found in _taken_apart(load_file(model.file), model.pipe).items():
        wanted = _state(getattr(model.pipe, name))
        assert {_bare(key) for key in found} == wanted.keys(), name
        for key, value in found.items():
            assert torch.equal(value, wanted[_bare(key)]), f"{name}.{key}"


def test_the_file_reads_back_bit_for_bit(model: Model) -> None:
    folder, file = (load_components(source, dtype=jnp.float32) for source in (model.folder, model.file))
    _assert_same_params(file.params, folder.params)
    for field in ("unet_config", "vae_config", "text_lengths", "is_xl", "zero_unconditional", "is_inpainting"):
        assert getattr(file, field) == getattr(folder, field), field
    assert file.scheduler_config == folder.scheduler_config
    assert file.is_inpainting == (model.pipe.unet.config.in_channels == 9)
    for name, network in _networks(folder).items():
        assert network.shapes == _networks(file)[name].shapes


def test_a_folder_made_of_the_file_is_theirs_again(model: Model, tmp_path: Path) -> None:
    convert_model(model.file, tmp_path / "again", "diffusers")
    again = _pipeline(tmp_path / "again")
    assert type(again) is type(model.pipe)
    assert again.scheduler.config == model.pipe.scheduler.config
    for name in ("unet", "vae", *_texts(model.pipe)):
        found, wanted = _state(getattr(again, name)), _state(getattr(model.pipe, name))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    call = {"padding": "max_length", "truncation": True}
    assert again.tokenizer(PROMPTS, **call)["input_ids"] == model.pipe.tokenizer(PROMPTS, **call)["input_ids"]


@pytest.fixture
def drawn(model: Model) -> tuple[Any, np.ndarray]:
    """What the pipeline is called with, and what it samples."""
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    call = {"prompt": PROMPTS, "latents": latents, "num_inference_steps": 3, "output_type": "np"}
    return call, model.pipe(**call).images


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"], indirect=True)
def test_their_pipeline_draws_the_same_from_the_file(model: Model, drawn: tuple[Any, np.ndarray]) -> None:
    call, wanted = drawn
    config = {"config": str(model.folder), "local_files_only": True, "torch_dtype": torch.float32}
    if hasattr(model.pipe, "text_encoder_2"):
        # Its loader tells SDXL's two encoders apart by their widths, which are the same in this tiny model.
        config["text_encoder_2"] = model.pipe.text_encoder_2
    pipe = type(model.pipe).from_single_file(str(model.file), **config)
    pipe.set_progress_bar_config(disable=True)
    assert relative_error(pipe(**call).images, wanted) < 1e-6


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"], indirect=True)
def test_loras_are_merged_as_theirs_are(model: Model, drawn: tuple[Any, np.ndarray], tmp_path: Path) -> None:
    call, without = drawn
    parts = load_components(model.folder, dtype=jnp.float32)
    adapters = {"unet": random_adapter(parts.shapes["unet"], 0, scale=0.5)}
    for name in parts.text_encoders:
        adapters[name] = random_adapter(parts.shapes[name], 1, rank=2, scale=0.5, targets=TEXT_TARGETS)
    write_lora(tmp_path / "lora.safetensors", adapters, layout="peft")
    convert_model(
        model.folder, tmp_path / "m.safetensors", "single-file", loras=[(tmp_path / "lora.safetensors", SCALE)]
    )
    convert_model(model.file, tmp_path / "folder", "diffusers", loras=[(tmp_path / "lora.safetensors", SCALE)])
    pipe = _pipeline(model.folder)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    pipe.fuse_lora(components=list(adapters), lora_scale=SCALE)
    wanted = pipe(**call).images
    pipe.unload_lora_weights()
    for name, found in _taken_apart(load_file(tmp_path / "m.safetensors"), pipe).items():
        state = _state(getattr(pipe, name))
        assert {_bare(key) for key in found} == state.keys()
        for key, value in found.items():
            assert relative_error(value, state[_bare(key)]) < TOLERANCE, f"{name}.{key}"
    images = _pipeline(tmp_path / "folder")(**call).images
    assert relative_error(images, wanted) < TOLERANCE
    assert relative_error(images, without) > 1e-2


@pytest.mark.parametrize("family", KINDS)
def test_the_names_at_full_size_are_those_they_know(family: str) -> None:
    """Every tensor of SD 1.5, 2.1 and XL under our names becomes one of theirs, of its shape, and none is missing."""
    stored = {key: torch.empty(shape, device="meta") for key, shape in layout(family).items()}
    configs = families.FAMILIES[family]
    known = {kind: name for kind, name in theirs_utils.CHECKPOINT_KEY_NAMES.items() if isinstance(name, str)}
    clip, open_clip = ("clip_sdxl", "open_clip_sdxl") if family == "sdxl" else ("clip", "open_clip")
    present = {"sd15": {"v1", clip}, "sd21": {"v1", open_clip}, "sdxl": {"xl_base", clip, open_clip}}[family]
    assert present <= {kind for kind, name in known.items() if name in stored}
    assert theirs_utils.infer_diffusers_model_type(stored) == {"sd15": "v1", "sd21": "v2", "sdxl": "xl_base"}[family]
    with torch.device("meta"):
        parts = {
            "unet": diffusers.UNet2DConditionModel.from_config(configs["unet"]),
            "vae": diffusers.AutoencoderKL.from_config(VAE_CONFIG),
        }
        for name, config in configs.items():
            if name != "unet":
                cls = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
                parts[name] = cls(CLIPTextConfig(**config))
    pipe = type("Parts", (), parts)
    assert KINDS[family] in ("sd1", "sd2", "sdxl")
    used = 0
    for name, found in _taken_apart(stored, pipe).items():
        wanted = {key: value.shape for key, value in _state(parts[name]).items()}
        assert {_bare(key): value.shape for key, value in found.items()} == wanted, name
        used += len(found)
    fused = sum(key.endswith(("in_proj_weight", "in_proj_bias")) for key in stored)
    assert used == len(stored) + 2 * fused
