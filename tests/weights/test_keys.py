"""Names and layouts on disk: one spelling is written, the others are understood, and every operation inverts."""

from __future__ import annotations

import numpy as np
import pytest

from hypersd_jax.weights.keys import (
    canonical_key,
    drop_pointwise,
    from_torch,
    is_extra,
    to_torch,
    torch_key,
    torch_shape,
)

PARAMETERS = {
    "down_blocks.0.resnets.1.conv1.kernel": ("down_blocks.0.resnets.1.conv1.weight", (3, 2, 5, 7), (7, 5, 3, 2)),
    "mid_block.attentions.0.to_q.kernel": ("mid_block.attentions.0.to_q.weight", (5, 7), (7, 5)),
    "conv_norm_out.scale": ("conv_norm_out.weight", (5,), (5,)),
    "conv_norm_out.bias": ("conv_norm_out.bias", (5,), (5,)),
    "text_model.embeddings.token_embedding.embedding": (
        "text_model.embeddings.token_embedding.weight",
        (9, 4),
        (9, 4),
    ),
    "vision_model.embeddings.class_embedding": ("vision_model.embeddings.class_embedding", (6,), (6,)),
}


@pytest.mark.parametrize("path", PARAMETERS)
def test_name_and_layout(path):
    name, ours, theirs = PARAMETERS[path]
    array = np.random.default_rng(0).standard_normal(theirs)
    assert torch_key(path) == name
    assert torch_shape(path, ours) == theirs
    assert from_torch(path, array).shape == ours
    np.testing.assert_array_equal(to_torch(path, from_torch(path, array)), array)


def test_convolution_axes():
    array = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    assert from_torch("conv_in.kernel", array)[4, 6, 2, 1] == array[1, 2, 4, 6]


@pytest.mark.parametrize(
    ("kind", "stored", "canonical"),
    [
        ("vae", "encoder.mid_block.attentions.0.query.weight", "encoder.mid_block.attentions.0.to_q.weight"),
        ("vae", "decoder.mid_block.attentions.0.key.bias", "decoder.mid_block.attentions.0.to_k.bias"),
        ("vae", "decoder.mid_block.attentions.0.value.bias", "decoder.mid_block.attentions.0.to_v.bias"),
        ("vae", "decoder.mid_block.attentions.0.proj_attn.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
        ("clip", "encoder.layers.0.mlp.fc1.bias", "text_model.encoder.layers.0.mlp.fc1.bias"),
        ("clip", "final_layer_norm.weight", "text_model.final_layer_norm.weight"),
        ("clip", "embeddings.position_ids", "text_model.embeddings.position_ids"),
    ],
)
def test_old_spellings_are_understood_and_the_canonical_one_stays(kind, stored, canonical):
    assert canonical_key(stored, kind) == canonical
    assert canonical_key(canonical, kind) == canonical


def test_names_that_are_no_alias_stay():
    assert canonical_key("text_projection.weight", "clip") == "text_projection.weight"
    assert canonical_key("vision_model.encoder.layers.0.mlp.fc1.bias", "clip").startswith("vision_model.encoder")
    assert canonical_key("encoder.conv_in.weight", "vae") == "encoder.conv_in.weight"
    assert canonical_key("encoder.layers.0.x", "unet") == "encoder.layers.0.x"


def test_extras():
    assert is_extra("text_model.embeddings.position_ids", "clip")
    assert is_extra("logit_scale", "clip")
    assert is_extra("vision_model.post_layernorm.bias", "clip")
    assert not is_extra("text_model.final_layer_norm.bias", "clip")
    assert not is_extra("logit_scale", "unet")


def test_only_the_attention_of_the_autoencoder_is_read_from_pointwise_convolutions():
    assert drop_pointwise("decoder.mid_block.attentions.0.to_out.0.weight", (8, 8, 1, 1), "vae") == (8, 8)
    assert drop_pointwise("decoder.mid_block.attentions.0.to_q.weight", (8, 8), "vae") == (8, 8)
    assert drop_pointwise("decoder.mid_block.resnets.0.conv_shortcut.weight", (8, 4, 1, 1), "vae") == (8, 4, 1, 1)
    assert drop_pointwise("mid_block.attentions.0.to_q.weight", (8, 8, 1, 1), "unet") == (8, 8, 1, 1)
