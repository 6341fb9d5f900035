"""CLIP's vision tower without PyTorch: configuration, parameter paths, what it refuses, data types."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.models.clip_vision import ClipVisionConfig, clip_vision
from tests.helpers.quick import quick_jit

TINY = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "projection_dim": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
PIXELS = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)


def _network(dtype=jnp.float32, **changes):
    return clip_vision(ClipVisionConfig.from_dict({**TINY, **changes}), dtype=dtype)


def test_missing_keys_take_the_defaults_of_transformers():
    config = ClipVisionConfig.from_dict({"attention_dropout": 0.0, "model_type": "clip_vision_model"})
    assert config == ClipVisionConfig()
    assert (config.hidden_size, config.patch_size, config.positions, config.hidden_act) == (768, 32, 50, "quick_gelu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu_new"),
        ("model_type", "clip_text_model"),
        ("hidden_size", 13),
        ("num_channels", 4),
        ("image_size", [8, 8]),
        ("patch_size", 0),
        ("patch_size", 9),
        ("layer_norm_eps", 0.0),
    ],
)
def test_what_cannot_be_honoured_is_named(key, value):
    with pytest.raises(UserError, match=rf"{key}={value!r}".replace("[", r"\[").replace("]", r"\]")):
        ClipVisionConfig.from_dict({**TINY, key: value})


def test_more_tokens_than_any_tower_has():
    with pytest.raises(UserError, match="image_size and patch_size make 1099511627777 tokens"):
        ClipVisionConfig.from_dict({**TINY, "image_size": 2**20, "patch_size": 1})


def test_parameter_paths():
    shapes = _network().shapes
    assert shapes["vision_model.embeddings.class_embedding"].shape == (12,)
    assert shapes["vision_model.embeddings.patch_embedding.kernel"].shape == (4, 4, 3, 12)
    assert shapes["vision_model.embeddings.position_embedding.embedding"].shape == (5, 12)
    assert shapes["vision_model.pre_layrnorm.scale"].shape == (12,)
    assert shapes["vision_model.encoder.layers.1.mlp.fc2.kernel"].shape == (20, 12)
    assert shapes["vision_model.post_layernorm.bias"].shape == (12,)
    assert shapes["visual_projection.kernel"].shape == (12, 5)
    assert len(shapes) == 3 + 2 + 2 * 16 + 2 + 1


def test_every_token_sees_every_patch():
    network = _network()
    params = network.init(0)
    before = jax.jit(network)(params, jnp.asarray(PIXELS))
    after = jax.jit(network)(params, jnp.asarray(PIXELS).at[0, 7, 7].add(1.0))
    assert before.last.shape == (2, 5, 12)
    assert before.pooled.shape == (2, 12)
    np.testing.assert_allclose(
        before.projected, before.pooled @ params["visual_projection.kernel"], rtol=1e-5, atol=1e-6
    )
    assert bool(jnp.all(jnp.any(before.last[0] != after.last[0], axis=-1)))
    np.testing.assert_array_equal(before.last[1], after.last[1])


def test_bfloat16_stays_close():
    full, half = _network(), _network(jnp.bfloat16)
    params = full.init(3)
    rounded = {path: value.astype(jnp.bfloat16) for path, value in params.items()}
    wanted, found = (quick_jit(f)(p, PIXELS).projected for f, p in ((full, params), (half, rounded)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.03 * float(jnp.abs(wanted).max()))


def test_images_of_another_size():
    network = _network()
    with pytest.raises(ValueError, match=r"shape \(9, 8, 3\), but the vision tower reads \(8, 8, 3\)"):
        network(network.init(0), jnp.zeros((1, 9, 8, 3)))
