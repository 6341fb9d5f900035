"""A whole model written back: the same weights and images, in one step or not at all."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.weights.components import load_components
from hypersd_jax.weights.diffusers.component import save_params
from hypersd_jax.weights.diffusers.model import save_model
from tests.helpers.tiny_model import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_there_and_back(model: Path, tmp_path: Path) -> None:
    components = load_components(model, dtype=jnp.float32)
    shifted = {**components.params["unet"]}
    shifted["conv_in.bias"] = shifted["conv_in.bias"] + 1.5
    save_model(components, tmp_path / "new" / "copy", params={**components.params, "unet": shifted})
    again = load_components(tmp_path / "new" / "copy", dtype=jnp.float32)
    for name, weights in components.params.items():
        for path, value in weights.items():
            wanted = value + 1.5 if (name, path) == ("unet", "conv_in.bias") else value
            np.testing.assert_array_equal(again.params[name][path], wanted, err_msg=path)
    files = {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()}
    assert {str(p.relative_to(tmp_path / "new" / "copy")) for p in (tmp_path / "new" / "copy").rglob("*.*")} == files
    assert json.loads((tmp_path / "new" / "copy" / "model_index.json").read_text()) == json.loads(
        (model / "model_index.json").read_text()
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]


def test_what_is_there_is_not_touched(model: Path, tmp_path: Path) -> None:
    components = load_components(model, dtype=jnp.float32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="mine: exists already"):
        save_model(components, tmp_path / "mine")
    with pytest.raises(UserError, match="cannot be written"):
        save_model(components, tmp_path / "mine" / "notes.txt" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def _indexed(model: Path, to: Path, **index: object) -> Path:
    """A copy of the model whose model_index.json says this."""
    shutil.copytree(model, to)
    (to / "model_index.json").write_text(json.dumps(index))
    return to


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint"])
def test_pipelines_of_every_task(model: Path, tmp_path: Path, task: str) -> None:
    folder = _indexed(model, tmp_path / "model", _class_name=f"StableDiffusion{task}Pipeline")
    assert not load_components(folder, dtype=jnp.float32).is_xl
    folder = _indexed(model, tmp_path / "xl", _class_name=f"StableDiffusionXL{task}Pipeline")
    with pytest.raises(UserError, match=r"text_encoder_2/config\.json: no such file"):
        load_components(folder, dtype=jnp.float32)


def test_pipelines_that_are_not_read(model: Path, tmp_path: Path) -> None:
    folder = _indexed(model, tmp_path / "a", _class_name="StableDiffusionInstructPix2PixPipeline")
    with pytest.raises(UserError, match=r"a/model_index\.json: _class_name='StableDiffusionInstructPix2PixPipeline'"):
        load_components(folder, dtype=jnp.float32)
    folder = _indexed(model, tmp_path / "b", _class_name="StableDiffusionXLPipeline", requires_aesthetics_score=True)
    with pytest.raises(UserError, match="the SDXL refiner is not supported"):
        load_components(folder, dtype=jnp.float32)


def test_a_safety_checker_is_left_out_with_one_note(model: Path, tmp_path: Path) -> None:
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": True,
        "safety_checker": checker,
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    folder = _indexed(model, tmp_path / "model", **index)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_components(folder, dtype=jnp.float32)  # named in the index and not there: as good as none
    (folder / "safety_checker").mkdir()
    (folder / "feature_extractor").mkdir()
    with pytest.warns(UserWarning, match="model: safety_checker and feature_extractor not used here$") as caught:
        components = load_components(folder, dtype=jnp.float32)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    save_model(components, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "model_index.json").read_text()) == {
        **index,
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }


def test_inpainting_models(model: Path, tmp_path: Path) -> None:
    folder = _indexed(model, tmp_path / "model", _class_name="StableDiffusionInpaintPipeline")
    config = {**json.loads((folder / "unet" / "config.json").read_text()), "in_channels": 9}
    save_params(folder / "unet", unet(UNetConfig.from_dict(config)).init(0), config=config, component_kind="unet")
    found = load_components(folder, dtype=jnp.float32)
    assert found.is_inpainting
    assert found.params["unet"]["conv_in.kernel"].shape == (3, 3, 9, 16)
    assert not load_components(model, dtype=jnp.float32).is_inpainting


@pytest.mark.parametrize("name", ["LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"])
def test_latent_consistency_models(model: Path, tmp_path: Path, name: str) -> None:
    folder = _indexed(model, tmp_path / "model", _class_name=name)
    config = {**json.loads((folder / "unet" / "config.json").read_text()), "time_cond_proj_dim": 8}
    save_params(folder / "unet", unet(UNetConfig.from_dict(config)).init(0), config=config, component_kind="unet")
    found = load_components(folder, dtype=jnp.float32)
    assert not found.is_xl
    assert found.params["unet"]["time_embedding.cond_proj.kernel"].shape == (8, 16)


@pytest.mark.parametrize("path", [".", "", "..", "new/..", "/"])
def test_a_path_without_a_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    components = load_components(model, dtype=jnp.float32)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"has no name of its own; name a new folder$"):
        save_model(components, path)
    assert [found.name for found in tmp_path.rglob("*")] == ["here"]
