"""Folders written by diffusers and transformers are read here, and those written here are read there."""

from __future__ import annotations

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.models.clip_text import ClipTextConfig, clip_text
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.models.vae import VaeConfig, vae
from hypersd_jax.weights import component_files, fingerprint, load_params, open_tensors, read_json, save_params
from hypersd_jax.weights.diffusers.component import STEMS
from hypersd_jax.weights.tensors import save_tensors

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from tests.helpers.torch_weights import perturb, to_ours, torch_name

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
VAE = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
CLIP = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "projection_dim": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 57,
    "eos_token_id": 58,
    "pad_token_id": 58,
}
COMPONENTS = {
    "unet": (
        "unet",
        diffusers.UNet2DConditionModel,
        lambda: diffusers.UNet2DConditionModel(**UNET),
        lambda config: unet(UNetConfig.from_dict(config), dtype=jnp.float32),
    ),
    "vae": (
        "vae",
        diffusers.AutoencoderKL,
        lambda: diffusers.AutoencoderKL(**VAE),
        lambda config: vae(VaeConfig.from_dict(config), dtype=jnp.float32),
    ),
    "clip": (
        "clip",
        transformers.CLIPTextModel,
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
        lambda config: clip_text(ClipTextConfig.from_dict(config), projection=False),
    ),
    "clip with projection": (
        "clip",
        transformers.CLIPTextModelWithProjection,
        lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP)),
        lambda config: clip_text(ClipTextConfig.from_dict(config), projection=True),
    ),
}
WRITINGS = {
    "single": {},
    "fp16 variant": {"variant": "fp16"},
    "sharded": {"max_shard_size": "20KB"},
    "sharded fp16 variant": {"max_shard_size": "10KB", "variant": "fp16"},
}


@pytest.fixture(scope="module", params=COMPONENTS)
def component(request, tmp_path_factory):
    """(kind, PyTorch class, PyTorch model, our shapes) of one component."""
    kind, cls, make, network = COMPONENTS[request.param]
    torch.manual_seed(0)
    model = perturb(make(), seed=1)
    folder = tmp_path_factory.mktemp("config")
    model.save_pretrained(folder)
    return kind, cls, model, network(read_json(folder / "config.json")).shapes


def _theirs(model, shapes):
    """The model's parameters under our paths; transformers 5 has no `text_model` in CLIPTextModel."""
    state = model.state_dict()
    names = {path: torch_name(path) for path in shapes}
    return {
        path: to_ours(path, state[name] if name in state else state[name.removeprefix("text_model.")])
        for path, name in names.items()
    }


def _assert_same(params, wanted):
    assert params.keys() == wanted.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(wanted[path]), err_msg=path)


@pytest.mark.parametrize("writing", WRITINGS)
def test_what_they_write_is_read(component, writing, tmp_path):
    kind, _, model, shapes = component
    options = WRITINGS[writing]
    if "variant" in options:
        model = copy.deepcopy(model).half()
    model.save_pretrained(tmp_path, **options)
    files = component_files(tmp_path, STEMS[kind])
    assert (len(files) > 1) == ("max_shard_size" in options)
    assert all(("fp16" in file.name) == ("variant" in options) for file in files)
    for variant in {None, options.get("variant")}:
        _assert_same(
            load_params(tmp_path, shapes, dtype=jnp.float32, component_kind=kind, variant=variant),
            _theirs(model, shapes),
        )


@pytest.mark.parametrize("dtype", [None, jnp.float16, jnp.bfloat16])
def test_what_is_written_here_they_load(component, dtype, tmp_path):
    kind, cls, model, shapes = component
    model.save_pretrained(tmp_path / "theirs")
    config = read_json(tmp_path / "theirs" / "config.json")
    params = load_params(tmp_path / "theirs", shapes, dtype=jnp.float32, component_kind=kind)
    save_params(tmp_path / "ours", params, config=config, component_kind=kind, dtype=dtype)

    kind_of_float = {None: torch.float32, jnp.float16: torch.float16, jnp.bfloat16: torch.bfloat16}[dtype]
    name = "dtype" if kind == "clip" else "torch_dtype"
    loaded, report = cls.from_pretrained(tmp_path / "ours", output_loading_info=True, **{name: kind_of_float})
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in loaded.parameters()} == {kind_of_float}
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].to(kind_of_float)), key
    again = load_params(tmp_path / "ours", shapes, dtype=jnp.float32, component_kind=kind)
    assert fingerprint(again) == fingerprint(params) or dtype == jnp.float16
    if dtype is None:
        _assert_same(again, params)


@pytest.mark.parametrize("name", ["clip", "clip with projection"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_text_encoders_with_and_without_the_prefix(name, prefixed, tmp_path):
    kind, cls, make, network = COMPONENTS[name]
    model = perturb(make(), seed=2)
    model.save_pretrained(tmp_path)
    shapes = network(read_json(tmp_path / "config.json")).shapes
    stored = {}
    for key, value in model.state_dict().items():
        bare = key.removeprefix("text_model.")
        stored[f"text_model.{bare}" if prefixed and not bare.startswith("text_projection") else bare] = value.numpy()
    positions = "text_model.embeddings.position_ids" if prefixed else "embeddings.position_ids"
    save_tensors(tmp_path / "model.safetensors", {**stored, positions: np.arange(8)[None]}, {"format": "pt"})
    params = load_params(tmp_path, shapes, dtype=jnp.float32, component_kind=kind)
    _assert_same(params, _theirs(model, shapes))
    # Both spellings are read by transformers too; what is written has the prefix, which releases before 5 need.
    assert not cls.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"]
    save_params(tmp_path, params, config=read_json(tmp_path / "config.json"), component_kind=kind)
    keys = open_tensors(tmp_path / "model.safetensors").keys()
    assert all(key.startswith("text_model.") or key == "text_projection.weight" for key in keys)


@pytest.mark.parametrize("window", [(), (1, 1)])
def test_old_attention_names_of_the_autoencoder(window, tmp_path):
    kind, _, make, network = COMPONENTS["vae"]
    model = perturb(make(), seed=3)
    model.save_pretrained(tmp_path)
    shapes = network(read_json(tmp_path / "config.json")).shapes
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    stored, renamed = {}, 0
    for key, value in model.state_dict().items():
        array = value.numpy()
        for new, name in old.items():
            if f".{new}." in key:
                key = key.replace(f".{new}.", f".{name}.")
                array = array.reshape(*array.shape, *window) if array.ndim == 2 else array
                renamed += 1
        stored[key] = array
    assert renamed == 16
    save_tensors(tmp_path / f"{STEMS[kind]}.safetensors", stored, {"format": "pt"})
    _assert_same(load_params(tmp_path, shapes, dtype=jnp.float32, component_kind=kind), _theirs(model, shapes))


def test_their_index_names_what_ours_reads(tmp_path):
    model = COMPONENTS["unet"][2]()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / f"{STEMS['unet']}.safetensors.index.json").read_text())
    assert {path.name for path in component_files(tmp_path, STEMS["unet"])} == set(index["weight_map"].values())


def test_all_values_arrive_as_device_arrays(component, tmp_path):
    kind, _, model, shapes = component
    model.save_pretrained(tmp_path)
    params = load_params(tmp_path, shapes, dtype=jnp.bfloat16, component_kind=kind)
    assert all(isinstance(value, jax.Array) and value.dtype == jnp.bfloat16 for value in params.values())
