"""CLIP's text tower against transformers: values, and gradients with respect to every parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.models.clip_text import ClipTextConfig, clip_text

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.helpers.torch_weights import params_from_torch, perturb, relative_error

TINY = {
    "vocab_size": 60,
    "intermediate_size": 64,
    "max_position_embeddings": 12,
    "bos_token_id": 57,
    "eos_token_id": 58,
    "pad_token_id": 58,
}
FAMILIES = {
    "clip-l": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "hidden_act": "quick_gelu"},
    "openclip-h": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "gelu"},
    "openclip-bigg": {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5, "hidden_act": "gelu"},
}
# The end (58) at different positions, padded with itself; id 59 is an added token above it.
IDS = np.array([[57, 3, 9, 58, 58, 58, 58], [57, 1, 58, 2, 58, 2, 2], [57, 59, 12, 4, 4, 30, 58]], np.int32)


def _pair(family, projection, **changes):
    """transformers' model inside a module that names its parameters as the projected one does, and its config."""
    values = {**TINY, **FAMILIES[family], "projection_dim": 20, **changes}
    config = transformers.CLIPTextConfig(**values, attn_implementation="eager")
    torch.manual_seed(0)
    if projection:
        model = perturb(transformers.CLIPTextModelWithProjection(config), seed=1)
        return model, model, values
    holder = torch.nn.Module()
    holder.text_model = model = perturb(transformers.CLIPTextModel(config), seed=1)
    return model, holder, values


def _theirs(model, ids):
    output = model(torch.tensor(ids, dtype=torch.long), output_hidden_states=True)
    pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
    return output.last_hidden_state, output.hidden_states[-2], pooled


@pytest.mark.parametrize(
    ("family", "eos", "projection"),
    [(family, eos, projection) for family in FAMILIES for eos, projection in ((2, False), (58, True))]
    + [("clip-l", 58, False), ("openclip-bigg", 2, True)],
)
def test_values_and_gradients(family, eos, projection):
    model, holder, values = _pair(family, projection, eos_token_id=eos)
    network = clip_text(ClipTextConfig.from_dict(values), dtype=jnp.float32, projection=projection)
    theirs = _theirs(model, IDS)
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(value.shape).astype(np.float32) for value in theirs]
    sum((torch.tensor(w) * value).sum() for w, value in zip(weights, theirs, strict=True)).backward()

    def loss(params):
        output = network(params, jnp.asarray(IDS))
        return sum(jnp.sum(w * value) for w, value in zip(weights, output, strict=True)), output

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params_from_torch(holder, network.shapes))
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-5, name
    for path, wanted in params_from_torch(holder, network.shapes, grads=True).items():
        if path.endswith("k_proj.bias"):  # exactly zero: the softmax does not see a shift of all keys
            assert float(jnp.abs(gradients[path]).max()) < 1e-4
        else:
            assert relative_error(gradients[path], wanted) < 1e-4, path


def test_penultimate_state_of_a_single_layer():
    model, holder, values = _pair("clip-l", False, num_hidden_layers=1)
    network = clip_text(ClipTextConfig.from_dict(values), projection=False)
    ours = jax.jit(network)(params_from_torch(holder, network.shapes), jnp.asarray(IDS))
    assert relative_error(ours.penultimate, _theirs(model, IDS)[1]) < 1e-5


def test_full_length():
    model, holder, values = _pair("openclip-bigg", True)
    ids = np.random.default_rng(3).integers(0, 60, (2, 12)).astype(np.int32)
    network = clip_text(ClipTextConfig.from_dict(values), projection=True)
    ours = jax.jit(network)(params_from_torch(holder, network.shapes), jnp.asarray(ids))
    for a, b in zip(ours, _theirs(model, ids), strict=True):
        assert relative_error(a, b) < 1e-5
