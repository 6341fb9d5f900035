"""CLIP's text tower without PyTorch: configuration, causality, pooling, data types, parameter paths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax import adapters
from hypersd_jax.errors import UserError
from hypersd_jax.models.clip_text import ClipTextConfig, clip_text

TINY = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "projection_dim": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "eos_token_id": 18,
}
IDS = jnp.array([[17, 3, 4, 5, 18, 18], [17, 9, 18, 18, 18, 18]], jnp.int32)


def _network(projection=True, dtype=jnp.float32, **changes):
    return clip_text(ClipTextConfig.from_dict({**TINY, **changes}), dtype=dtype, projection=projection)


def _params(network):
    """Random parameters of about the sizes of trained ones; drawn by NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)
    params = {}
    for path, leaf in network.shapes.items():
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        params[path] = jnp.asarray(1 + 0.2 * values if path.endswith("scale") else 0.2 * values)
    return params


@pytest.fixture(scope="module")
def encoder():
    network = _network()
    return jax.jit(network), _params(network)


def test_missing_keys_take_the_defaults_of_transformers_and_others_are_passed_over():
    config = ClipTextConfig.from_dict(
        {"attention_dropout": 0.0, "architectures": ["CLIPTextModel"], "dtype": "float16"}
    )
    assert config == ClipTextConfig()
    assert (config.hidden_size, config.eos_token_id, config.hidden_act) == (512, 49407, "quick_gelu")
    assert ClipTextConfig.from_dict({"projection_dim": None}).projection_dim == 512


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu_new"),
        ("model_type", "t5"),
        ("hidden_size", "768"),
        ("hidden_size", 15),
        ("num_hidden_layers", 0),
        ("num_attention_heads", True),
        ("layer_norm_eps", "small"),
        ("layer_norm_eps", 0.0),
        ("eos_token_id", [1, 2]),
        ("eos_token_id", 2**40),
        ("vocab_size", 10**12),
        ("layer_norm_eps", 10**50),
    ],
)
def test_what_cannot_be_honoured_is_named(key, value):
    with pytest.raises(UserError, match=rf"{key}={value!r}".replace("[", r"\[").replace("]", r"\]")):
        ClipTextConfig.from_dict({**TINY, key: value})


def test_more_layers_than_any_model_has():
    with pytest.raises(UserError, match="num_hidden_layers makes 1000000 layers, more than 512"):
        ClipTextConfig.from_dict({**TINY, "num_hidden_layers": 10**6})


def test_parameter_paths():
    shapes = _network().shapes
    assert shapes["text_model.embeddings.token_embedding.embedding"].shape == (20, 16)
    assert shapes["text_model.embeddings.position_embedding.embedding"].shape == (8, 16)
    assert shapes["text_model.encoder.layers.1.self_attn.out_proj.kernel"].shape == (16, 16)
    assert shapes["text_model.encoder.layers.0.mlp.fc1.kernel"].shape == (16, 24)
    assert shapes["text_model.final_layer_norm.scale"].shape == (16,)
    assert shapes["text_projection.kernel"].shape == (16, 6)
    assert len(shapes) == 2 + 2 * 16 + 2 + 1
    assert "text_projection.kernel" not in _network(projection=False).shapes


def test_a_token_sees_only_those_before_it(encoder):
    network, params = encoder
    before = network(params, IDS)
    after = network(params, IDS.at[:, 3].set(7))
    np.testing.assert_array_equal(before.last[:, :3], after.last[:, :3])
    assert bool(jnp.all(jnp.any(before.last[:, 3:] != after.last[:, 3:], axis=-1)))


def test_pooled_is_the_state_at_the_first_end_token(encoder):
    network, params = encoder
    output = network(params, IDS)
    states = jnp.stack([output.last[0, 4], output.last[1, 2]])
    np.testing.assert_allclose(output.pooled, states @ params["text_projection.kernel"], rtol=1e-5, atol=1e-6)


def test_legacy_end_token_means_the_highest_id():
    network = _network(projection=False, eos_token_id=2, num_hidden_layers=1)
    output = jax.jit(network)(_params(network), jnp.array([[17, 2, 4, 19, 18]], jnp.int32))
    # One token's states, computed twice in one program: the last bit depends on how the compiler fuses.
    np.testing.assert_allclose(output.pooled, output.last[:, 3], rtol=1e-6, atol=1e-7)


def test_too_many_tokens(encoder):
    network, params = encoder
    with pytest.raises(ValueError, match="9 tokens, but the text encoder has 8 positions"):
        network(params, jnp.zeros((1, 9), jnp.int32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_near_float32(encoder, dtype):
    network, params = encoder
    half = jax.jit(_network(dtype=dtype))({path: value.astype(dtype) for path, value in params.items()}, IDS)
    for a, b in zip(half, network(params, IDS), strict=True):
        assert a.dtype == dtype
        assert float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) < 0.03


def test_an_adapter_acts_as_the_merged_weights(encoder):
    network, params = encoder
    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    shapes = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in params.items()}
    adapter = adapters.init(jax.random.key(1), shapes, rank=2, targets=targets)
    assert len(adapter) == 12
    adapter = {path: {**entry, "up": entry["up"] + 0.3} for path, entry in adapter.items()}
    merged = network(adapters.merge(params, adapter), IDS)
    for a, b, base in zip(network(params, IDS, adapter=adapter), merged, network(params, IDS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert float(jnp.abs(a - base).max()) > 1e-2
