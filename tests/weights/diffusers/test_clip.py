"""A whole CLIP from a folder or a file: what is read, what is passed over, and every refusal in one line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.weights.diffusers.clip import load_clip_model, read_configs
from hypersd_jax.weights.keys import from_torch, torch_key
from hypersd_jax.weights.tensors import save_tensors
from tests.helpers.tiny_clip import CONFIG, tiny_clip, tiny_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_clip(tmp_path / "clip")


def _load(source: Path) -> Any:
    return load_clip_model(source, dtype=jnp.float32)


def _with(folder: Path, **changes: Any) -> None:
    """Write the weights with tensors changed, or left out where None."""
    tensors = {**tiny_tensors(), **{key.replace("__", "."): value for key, value in changes.items()}}
    save_tensors(folder / "model.safetensors", {key: value for key, value in tensors.items() if value is not None})


def test_every_tensor_has_its_place(folder: Path) -> None:
    loaded, tensors = _load(folder), tiny_tensors()
    assert loaded.params.keys() == {*loaded.text.shapes, *loaded.vision.shapes, "logit_scale"}
    assert {torch_key(path) for path in loaded.params} == tensors.keys()
    for path, value in loaded.params.items():
        np.testing.assert_array_equal(value, from_torch(path, tensors[torch_key(path)]), err_msg=path)
    assert loaded.text_config.projection_dim == loaded.vision_config.projection_dim == 6
    assert loaded.image_processor == {}
    assert set(loaded.tokenizer.files) <= {path.name for path in folder.iterdir()} - {"model.safetensors"}


def test_a_file_with_its_configuration_beside_it(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = _load(folder / "model.safetensors")
    assert found.vision_config == _load(folder).vision_config
    np.testing.assert_array_equal(
        found.params["visual_projection.kernel"], tiny_tensors()["visual_projection.weight"].T
    )


def test_shards(folder: Path) -> None:
    tensors = sorted(tiny_tensors().items())
    (folder / "model.safetensors").unlink()
    names = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    for name, part in zip(names, (tensors[:9], tensors[9:]), strict=True):
        save_tensors(folder / name, dict(part))
    weight_map = {key: names[i >= 9] for i, (key, _) in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path, value in _load(folder).params.items():
        np.testing.assert_array_equal(value, from_torch(path, dict(tensors)[torch_key(path)]), err_msg=path)
    save_tensors(folder / names[1], dict(tensors[8:]))
    with pytest.raises(UserError, match=rf"1 ill-fitting \({tensors[8][0]} stored twice\)$"):
        _load(folder)


def test_old_buffers_are_passed_over(folder: Path) -> None:
    _with(
        folder,
        text_model__embeddings__position_ids=np.arange(24)[None],
        vision_model__embeddings__position_ids=np.arange(10)[None],
    )
    assert "text_model.embeddings.position_ids" not in _load(folder).params


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_scale": None}, r"1 missing \(logit_scale\)$"),
        ({"visual_projection__weight": None}, r"1 missing \(visual_projection\.weight\)$"),
        ({"vision_model__head": np.zeros(2, np.float32)}, r"1 unexpected \(vision_model\.head\)$"),
        ({"logit_scale": np.zeros(1, np.float32)}, r"1 ill-fitting \(logit_scale \[1\] instead of \[\]\)$"),
        ({"logit_scale": np.int32(4)}, r"1 ill-fitting \(logit_scale of type int32\)$"),
        ({"logit_scale": np.float32(np.nan)}, r"tensor logit_scale holds NaN or infinity$"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    _with(folder, **changes)
    with pytest.raises(UserError, match=rf"^{folder}.*{message}"):
        _load(folder)


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"clip: no model\.safetensors"):
        _load(folder)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: pickled weights are not read"):
        _load(folder / "pytorch_model.bin")


def test_what_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no such file or folder$"):
        _load(tmp_path / "nothing")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file$"):
        _load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip_text_model"}, "CLIPModel config: model_type='clip_text_model' is not supported"),
        ({"vision_config": None}, "CLIPModel config: vision_config=None is not an object"),
        ({"text_config": {"hidden_act": "relu"}}, "CLIPTextModel config: hidden_act='relu' is not supported"),
        ({"vision_config": {"patch_size": "4"}}, "CLIPVisionModel config: patch_size='4' is not a positive"),
        ({"projection_dim": 0}, "CLIPTextModel config: projection_dim=0 is not a positive"),
    ],
)
def test_configurations_that_cannot_be_honoured(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        _load(folder)


def test_configurations_that_say_things_twice() -> None:
    text, vision = read_configs({**CONFIG, "vision_config_dict": {"image_size": 336}, "text_config_dict": None})
    assert (text.hidden_size, vision.image_size, vision.hidden_size, vision.projection_dim) == (16, 336, 768, 6)


def _wide(width: int) -> dict[str, Any]:
    """A CLIP of a published vision width and otherwise small."""
    text = {"vocab_size": 30, "hidden_size": 128, "intermediate_size": 8, "num_hidden_layers": 1}
    vision = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 12}
    return {
        "projection_dim": 7,
        "text_config": {**text, "num_attention_heads": 2, "max_position_embeddings": 9},
        "vision_config": {**vision, "image_size": 6, "patch_size": 2},
    }


def test_a_file_alone_is_read_by_its_shapes_with_a_warning(tmp_path: Path) -> None:
    save_tensors(tmp_path / "b32.safetensors", tiny_tensors(_wide(768)))
    with pytest.warns(
        UserWarning, match=r"b32\.safetensors: no config\.json beside it; read as .* quick_gelu$"
    ) as found:
        loaded = _load(tmp_path / "b32.safetensors")
    assert len(found) == 1
    assert found[0].filename == __file__
    assert (loaded.text_config, loaded.vision_config) == read_configs(_wide(768))


def test_a_file_alone_that_tells_too_little(tmp_path: Path) -> None:
    save_tensors(tmp_path / "odd.safetensors", tiny_tensors(_wide(24)))
    with pytest.raises(
        UserError, match=r"odd\.safetensors: has no config\.json beside it, and no known CLIP is 24 wide"
    ):
        _load(tmp_path / "odd.safetensors")
    save_tensors(tmp_path / "lora.safetensors", {"x": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"lora\.safetensors: holds no CLIPModel \(no vision_model\."):
        _load(tmp_path / "lora.safetensors")


def test_the_image_processor(folder: Path) -> None:
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"resample": 2}}))
    assert _load(folder).image_processor == {"resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps({"resample": 3}))
    assert _load(folder).image_processor == {"resample": 3}
