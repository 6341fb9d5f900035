"""CLIP's vision tower against transformers: values, and gradients with respect to the pixels and every parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.models.clip_vision import ClipVisionConfig, clip_vision
from hypersd_jax.weights.keys import from_torch, torch_key

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.helpers.torch_weights import perturb, relative_error

SIZES = {
    # Patches that fit, and such that leave a rim over; heads of width 8, 10 and 5.
    "openai": {"hidden_size": 24, "num_attention_heads": 3, "image_size": 21, "patch_size": 7},
    "openclip": {"hidden_size": 20, "num_attention_heads": 2, "image_size": 23, "patch_size": 5, "hidden_act": "gelu"},
    "one patch": {
        "hidden_size": 15,
        "num_attention_heads": 3,
        "image_size": 6,
        "patch_size": 4,
        "num_hidden_layers": 1,
    },
}


def _ours(module, shapes, *, grads=False):
    theirs = {name: p.grad if grads else p for name, p in module.named_parameters()}
    assert {torch_key(path) for path in shapes} == theirs.keys()
    found = {path: theirs[torch_key(path)].detach().numpy() for path in shapes}
    return {path: jnp.asarray(from_torch(path, array)) for path, array in found.items()}


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size):
    values = {"intermediate_size": 37, "num_hidden_layers": 2, "projection_dim": 11, **SIZES[size]}
    config = transformers.CLIPVisionConfig(**values, attn_implementation="eager")
    torch.manual_seed(0)
    model = perturb(transformers.CLIPVisionModelWithProjection(config), seed=1)
    network = clip_vision(ClipVisionConfig.from_dict(config.to_dict()))

    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, values["image_size"], values["image_size"], 3)).astype(np.float32)
    nchw = torch.tensor(pixels.transpose(0, 3, 1, 2), requires_grad=True)
    found = model.vision_model(nchw)
    theirs = (found.last_hidden_state, found.pooler_output, model(nchw).image_embeds)
    weights = [rng.standard_normal(value.shape).astype(np.float32) for value in theirs]
    sum((torch.tensor(w) * value).sum() for w, value in zip(weights, theirs, strict=True)).backward()

    def loss(params, pixels):
        output = network(params, pixels)
        return sum(jnp.sum(w * value) for w, value in zip(weights, output, strict=True)), output

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (gradients, by_pixel), ours = run(_ours(model, network.shapes), jnp.asarray(pixels))
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-5, name
    assert relative_error(by_pixel, nchw.grad.permute(0, 2, 3, 1)) < 1e-4
    for path, wanted in _ours(model, network.shapes, grads=True).items():
        if path.endswith("k_proj.bias"):  # exactly zero: the softmax does not see a shift of all keys
            assert float(jnp.abs(gradients[path]).max()) < 1e-4
        else:
            assert relative_error(gradients[path], wanted) < 1e-4, path
