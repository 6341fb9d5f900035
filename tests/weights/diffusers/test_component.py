"""Component folders: which files are taken, what is refused and how, and what comes back."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.weights import (
    component_files,
    fingerprint,
    load_params,
    open_tensors,
    read_json,
    save_params,
    save_tensors,
)
from hypersd_jax.weights.components import load_components
from tests.helpers.tiny_model import TEXT, tiny_model

PLAIN = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHAPES = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in {
        "conv_in.kernel": (3, 3, 4, 8),
        "conv_in.bias": (8,),
        "time_embedding.linear_1.kernel": (8, 6),
        "conv_norm_out.scale": (8,),
    }.items()
}


def _stored(seed=0, dtype=np.float32):
    """What a UNet of `SHAPES` looks like on disk."""
    rng = np.random.default_rng(seed)
    shapes = {
        "conv_in.weight": (8, 4, 3, 3),
        "conv_in.bias": (8,),
        "time_embedding.linear_1.weight": (6, 8),
        "conv_norm_out.weight": (8,),
    }
    return {key: rng.standard_normal(shape).astype(dtype) for key, shape in shapes.items()}


def _load(folder, **changes):
    return load_params(folder, SHAPES, **{"dtype": jnp.float32, "component_kind": "unet", **changes})


def _shard(folder, stored, half=False):
    """Two shards and their index, named as diffusers does."""
    part = ".fp16" if half else ""
    names = [f"diffusion_pytorch_model{part}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(stored)}
    for name in names:
        save_tensors(folder / name, {key: value for key, value in stored.items() if weight_map[key] == name})
    index = INDEX.replace(".json", f"{part}.json")
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return names


def test_layout_order_and_type(tmp_path):
    stored = _stored()
    save_tensors(tmp_path / PLAIN, stored)
    params = _load(tmp_path)
    assert list(params) == list(SHAPES)
    assert all(isinstance(value, jax.Array) for value in params.values())
    np.testing.assert_array_equal(params["conv_in.kernel"], stored["conv_in.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params["time_embedding.linear_1.kernel"], stored["time_embedding.linear_1.weight"].T)
    np.testing.assert_array_equal(params["conv_norm_out.scale"], stored["conv_norm_out.weight"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("stored_as", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_every_stored_type_casts_to_every_dtype(tmp_path, stored_as, dtype):
    stored = _stored(dtype=stored_as)
    save_tensors(tmp_path / PLAIN, stored)
    params = _load(tmp_path, dtype=dtype)
    assert {value.dtype for value in params.values()} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(params["conv_norm_out.scale"], stored["conv_norm_out.weight"].astype(dtype))


def test_plain_is_preferred_and_fp16_is_the_fallback(tmp_path):
    save_tensors(tmp_path / HALF, _stored(1, np.float16))
    assert component_files(tmp_path, "diffusion_pytorch_model") == [tmp_path / HALF]
    save_tensors(tmp_path / PLAIN, _stored(2))
    assert component_files(tmp_path, "diffusion_pytorch_model") == [tmp_path / PLAIN]
    assert component_files(tmp_path, "diffusion_pytorch_model", "fp16") == [tmp_path / HALF]
    np.testing.assert_array_equal(_load(tmp_path)["conv_in.bias"], _stored(2)["conv_in.bias"])
    np.testing.assert_array_equal(_load(tmp_path, variant="fp16")["conv_in.bias"], _stored(1, "f2")["conv_in.bias"])


@pytest.mark.parametrize("half", [False, True])
def test_shards(tmp_path, half):
    names = _shard(tmp_path, _stored(), half)
    assert component_files(tmp_path, "diffusion_pytorch_model") == [tmp_path / name for name in names]
    np.testing.assert_array_equal(_load(tmp_path)["conv_norm_out.scale"], _stored()["conv_norm_out.weight"])


def test_sharding_rule_places_each_parameter(tmp_path):
    save_tensors(tmp_path / PLAIN, _stored())
    asked = []
    device = jax.sharding.SingleDeviceSharding(jax.devices()[-1])

    def rule(path, shape):
        asked.append((path, shape.shape))
        return device

    params = _load(tmp_path, sharding=rule)
    assert sorted(asked) == sorted((path, shape.shape) for path, shape in SHAPES.items())
    assert all(value.sharding == device for value in params.values())


def test_host_memory_holds_one_tensor_at_a_time(tmp_path):
    count, size = 24, (256, 256)
    shapes = {f"blocks.{i}.kernel": jax.ShapeDtypeStruct(size, jnp.float32) for i in range(count)}
    save_tensors(tmp_path / PLAIN, {f"blocks.{i}.weight": np.ones(size, np.float32) for i in range(count)})
    one = 4 * size[0] * size[1]
    tracemalloc.start()
    params = load_params(tmp_path, shapes, dtype=jnp.bfloat16, component_kind="unet")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # On a CPU the parameters themselves may be NumPy's memory; above them there is room for a few tensors only.
    assert peak < sum(value.nbytes for value in params.values()) + 4 * one


def _drop(*keys):
    return {key: value for key, value in _stored().items() if key not in keys}


def _with(**changes):
    return {**_stored(), **{key.replace("__", "."): value for key, value in changes.items()}}


def _poisoned(value, dtype=np.float32):
    stored = _stored(dtype=dtype)
    stored["conv_in.weight"][3, 1, 2, 0] = value
    return stored


BAD_TENSORS = {
    "missing": (_drop("conv_in.bias"), r"1 missing \(conv_in\.bias\)"),
    "unexpected": (_with(extra__weight=np.zeros(3)), r"1 unexpected \(extra\.weight\)"),
    "shape": (
        _with(conv_in__bias=np.zeros(9, np.float32)),
        r"1 ill-fitting \(conv_in\.bias \[9\] instead of \[8\]\)",
    ),
    "transposed": (_with(**{"time_embedding.linear_1.weight": np.zeros((8, 6))}), r"\[8, 6\] instead of \[6, 8\]"),
    "convolution for linear": (_with(**{"time_embedding.linear_1.weight": np.zeros((6, 8, 1, 1))}), r"\[6, 8, 1, 1\]"),
    "integers": (_with(conv_in__bias=np.zeros(8, np.int64)), r"conv_in\.bias of type int64"),
    "all at once": (
        {"conv_in.weight": np.zeros((1, 1), np.float32), "other": np.zeros(1), "another": np.zeros(1)},
        r"3 missing \(.*conv_norm_out\.weight.*\); 2 unexpected \(.*\); 1 ill-fitting \(conv_in\.weight",
    ),
    "many": (_with(**{f"x{i:03}": np.zeros(1) for i in range(100)}), r"100 unexpected \((x\d+, ){8}\.\.\.\)"),
    "nan": (_poisoned(np.nan), r"safetensors: tensor conv_in\.weight holds NaN or infinity"),
    "infinity in half": (_poisoned(np.inf, np.float16), r"tensor conv_in\.weight holds NaN or infinity"),
    "nan in float8": (_poisoned(np.nan, ml_dtypes.float8_e4m3fn), r"tensor conv_in\.weight holds NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_all_named_in_one_line(tmp_path, case):
    stored, message = BAD_TENSORS[case]
    save_tensors(tmp_path / PLAIN, stored)
    with pytest.raises(UserError, match=message) as caught:
        _load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("value", "stored_as"), [(1e5, np.float32), (1e5, ml_dtypes.bfloat16)])
def test_values_beyond_the_asked_type(tmp_path, value, stored_as):
    save_tensors(tmp_path / PLAIN, _poisoned(value, stored_as))
    _load(tmp_path, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match=r"tensor conv_in\.weight does not fit into float16"):
        _load(tmp_path, dtype=jnp.float16)


def test_a_key_in_two_spellings_or_two_shards(tmp_path):
    shapes = {"text_model.final_layer_norm.bias": jax.ShapeDtypeStruct((2,), jnp.float32)}
    zeros = np.zeros(2, np.float32)
    both = {"final_layer_norm.bias": zeros, "text_model.final_layer_norm.bias": zeros}
    save_tensors(tmp_path / "model.safetensors", both)
    with pytest.raises(UserError, match=r"final_layer_norm\.bias stored twice"):
        load_params(tmp_path, shapes, dtype=jnp.float32, component_kind="clip")


def test_known_extras_are_passed_over(tmp_path):
    shapes = {"text_model.final_layer_norm.bias": jax.ShapeDtypeStruct((2,), jnp.float32)}
    extras = {
        "text_model.embeddings.position_ids": np.arange(3)[None],
        "embeddings.position_ids": np.arange(3)[None],
        "logit_scale": np.float32(1),
        "text_projection.weight": np.zeros((2, 2), np.float32),
        "vision_model.post_layernorm.bias": np.zeros(2, np.float32),
    }
    save_tensors(tmp_path / "model.safetensors", {"final_layer_norm.bias": np.ones(2, np.float32), **extras})
    params = load_params(tmp_path, shapes, dtype=jnp.float32, component_kind="clip")
    np.testing.assert_array_equal(params["text_model.final_layer_norm.bias"], [1, 1])
    with_projection = {**shapes, "text_projection.kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    assert len(load_params(tmp_path, with_projection, dtype=jnp.float32, component_kind="clip")) == 2


def test_old_attention_of_the_autoencoder(tmp_path):
    base = "decoder.mid_block.attentions.0"
    new, old = ("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")
    shapes = {}
    for name in new:
        shapes[f"{base}.{name}.kernel"] = jax.ShapeDtypeStruct((4, 4), jnp.float32)
        shapes[f"{base}.{name}.bias"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((4, 4)).astype(np.float32) for name in new}
    for names in (new, old):
        for window in ((), (1, 1)):
            stored = {}
            for name, canonical in zip(names, new, strict=True):
                stored[f"{base}.{name}.weight"] = weights[canonical].reshape(4, 4, *window)
                stored[f"{base}.{name}.bias"] = np.zeros(4, np.float32)
            save_tensors(tmp_path / PLAIN, stored)
            params = load_params(tmp_path, shapes, dtype=jnp.float32, component_kind="vae")
            for name in new:
                np.testing.assert_array_equal(params[f"{base}.{name}.kernel"], weights[name].T)


def _index(content):
    return lambda folder: (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))


BAD_FOLDERS = {
    "no folder": (lambda folder: folder.rmdir(), "no such folder"),
    "nothing": (lambda folder: None, f"no {PLAIN}$"),
    "only a pickle": (lambda folder: (folder / "diffusion_pytorch_model.bin").touch(), "only pickled weights"),
    "another name": (lambda folder: (folder / "lora.safetensors").touch(), r"only lora\.safetensors"),
    "empty file": (lambda folder: (folder / PLAIN).touch(), "is empty"),
    "pointer": (
        lambda folder: (folder / PLAIN).write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n"),
        "is a Git LFS pointer",
    ),
    "index without map": (_index({}), "has no weight_map"),
    "index of nothing": (_index({"weight_map": {}}), "has no weight_map"),
    "index cut short": (_index('{"weight_map": {\n"a": '), r"index\.json:2: not valid JSON"),
    "shard missing": (_index({"weight_map": {"a": "gone.safetensors"}}), r"1 missing file\(s\): gone\.safetensors"),
    "shard of no name": (_index({"weight_map": {"a": ["x"] * 300}}), "weight_map holds something else than file names"),
    "shard of a long name": (_index({"weight_map": {"a": "x" * 300}}), r"1 missing file\(s\): xxx"),
    "shard outside": (_index({"weight_map": {"a": "../b.safetensors"}}), r"\.\./b\.safetensors, which lies outside"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_named_in_one_line(tmp_path, case):
    make, message = BAD_FOLDERS[case]
    folder = tmp_path / "unet"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=message) as caught:
        _load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_variant_that_is_not_there(tmp_path):
    save_tensors(tmp_path / PLAIN, _stored())
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model\.ema\.safetensors, only diffusion_pytorch_model"):
        _load(tmp_path, variant="ema")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', r"config\.json:2: not valid JSON"),
        (b"[1]", r"config\.json:1: expected a JSON object, found list"),
        (b"", r"config\.json:1: not valid JSON"),
        (b"\xff\xfe\x00", r"config\.json: is not text"),
        (b'{"a":' * 10**5, r"config\.json: JSON that is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"config\.json: JSON .* with a number of too many digits"),
    ],
)
def test_bad_json_names_file_and_line(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "config.json")


def test_json_that_is_missing_or_a_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


def test_what_is_saved_comes_back(tmp_path):
    save_tensors(tmp_path / "a" / PLAIN, _stored())
    params = _load(tmp_path / "a")
    config = {"_class_name": "UNet2DConditionModel", "sample_size": 8}
    save_params(tmp_path / "b", params, config=config, component_kind="unet")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", PLAIN]
    assert read_json(tmp_path / "b" / "config.json") == config
    file = open_tensors(tmp_path / "b" / PLAIN)
    assert file.metadata == {"format": "pt"}
    assert set(file.keys()) == set(_stored())
    for key, value in _stored().items():
        np.testing.assert_array_equal(file.read(key), value)


def test_the_type_that_is_written_is_the_type_that_the_configuration_names(tmp_path):
    params = {"final_layer_norm.bias": jnp.ones(2)}
    save_params(tmp_path, params, config={"torch_dtype": "float32"}, component_kind="clip", dtype=jnp.float16)
    assert open_tensors(tmp_path / "model.safetensors").dtype("final_layer_norm.bias") == np.float16
    assert read_json(tmp_path / "config.json") == {"torch_dtype": "float16"}


def test_saving_over_shards_is_refused(tmp_path):
    _shard(tmp_path, _stored())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="holds a sharded model"):
        save_params(tmp_path, _load(tmp_path), config={}, component_kind="unet")
    assert sorted(tmp_path.iterdir()) == before


def test_fingerprint_knows_the_model_and_not_how_it_was_loaded(tmp_path):
    save_tensors(tmp_path / PLAIN, _stored())
    params = _load(tmp_path)
    name = fingerprint(params)
    assert len(name) == 64
    assert fingerprint(dict(reversed(params.items()))) == name
    assert fingerprint(_load(tmp_path, dtype=jnp.bfloat16)) == name
    assert fingerprint({path: jax.device_put(value, jax.devices()[-1]) for path, value in params.items()}) == name
    assert fingerprint(jax.tree.map(np.asarray, params)) == name
    assert fingerprint({**params, "conv_in.bias": params["conv_in.bias"].at[0].add(0.1)}) != name
    assert fingerprint({**params, "conv_in.bias": params["conv_in.bias"].reshape(2, 4)}) != name
    renamed = {path.replace("conv_in", "conv_im"): value for path, value in params.items()}
    assert fingerprint(renamed) != name
    assert fingerprint({"x": jnp.float32(1)}) != fingerprint({"x": jnp.float32(2)})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def _changed(model, to, file, **changes):
    """A copy of a model whose JSON file says something else."""
    shutil.copytree(model, to)
    path = to / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))
    return to


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet", {"cross_attention_dim": 32}, r"cross_attention_dim=32, but hidden_size of text_encoder makes 16"),
        ("text_encoder", {"hidden_size": 24}, r"cross_attention_dim=16, but hidden_size of text_encoder makes 24"),
        ("unet", {"in_channels": 8}, r"in_channels=8, but the vae has latent_channels=4 \(.*InstructPix2Pix"),
        ("unet", {"in_channels": 5}, r"in_channels=5, but the vae has latent_channels=4$"),
        ("unet", {"out_channels": 8}, r"out_channels=8, but the vae has latent_channels=4$"),
        ("vae", {"latent_channels": 16}, r"in_channels=4, but the vae has latent_channels=16$"),
        (
            "unet",
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 64,
            },
            r"leaves 16 for pooled text, but projection_dim of text_encoder_2 is missing",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other(model, tmp_path, file, changes, message):
    folder = _changed(model, tmp_path / "bad", f"{file}/config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_components(folder, dtype=jnp.float32)
    assert str(folder / "unet" / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_two_encoders_of_sdxl_are_joined(model, tmp_path):
    folder = _changed(model, tmp_path / "xl", "model_index.json", _class_name="StableDiffusionXLPipeline")
    (folder / "text_encoder_2").mkdir()
    (folder / "text_encoder_2" / "config.json").write_text(json.dumps(TEXT))
    with pytest.raises(UserError, match="hidden_size of text_encoder and text_encoder_2 makes 32"):
        load_components(folder, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("force_upcast", "dtype", "kept"),
    [(True, jnp.float16, "float32"), (False, jnp.float16, "float16"), (True, jnp.bfloat16, "bfloat16")],
)
def test_an_autoencoder_that_overflows_in_float16_stays_in_float32(model, tmp_path, force_upcast, dtype, kept):
    folder = _changed(model, tmp_path / "model", "vae/config.json", force_upcast=force_upcast)
    parts = load_components(folder, dtype=dtype)
    assert {str(value.dtype) for value in parts.params["vae"].values()} == {kept}
    assert {value.dtype for value in parts.params["unet"].values()} == {jnp.dtype(dtype)}
    image = jax.eval_shape(lambda z: parts.vae(parts.params["vae"], z, method="decode"), jnp.ones((1, 2, 2, 4), dtype))
    assert str(image.dtype) == kept


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json") == {"a": 1}
