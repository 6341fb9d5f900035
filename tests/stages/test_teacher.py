"""The teacher stage's loss by hand, for both kinds of unconditional: the empty caption, and SDXL's zeros."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.bases import StableDiffusion
from hypersd_jax.config import TeacherStage
from hypersd_jax.distill import corruption
from hypersd_jax.stages import denoising
from hypersd_jax.training import make_mesh
from hypersd_jax.weights.components import load_components
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tiny_xl import tiny_xl

ROWS = 6
STAGE = TeacherStage(name="s", kind="teacher", updates=1, batch_size=ROWS, prompt_dropout=0.5, snr_gamma=5.0)
CAPTIONS = ["red apple, noto style", "lion", "cat face, blob style", "pear", "dog", "rose, noto style"]


@pytest.mark.parametrize("make", [tiny_model, tiny_xl], ids=["sd", "sdxl"])
def test_the_loss_by_hand(make, tmp_path):
    components = load_components(make(tmp_path / "m"), dtype=jnp.float32)
    base = StableDiffusion(components=components, dtype=jnp.float32, mesh=make_mesh(1, 1))
    params = {name: dict(part) for name, part in components.params.items()}
    key = jax.random.key(3)
    drawn = corruption(key, (ROWS, 8, 8, 4), jnp.arange(ROWS), times=1000, prompt_dropout=0.5)
    assert 0 < int(drawn.dropped.sum()) < ROWS
    latents = jax.random.normal(jax.random.key(4), (ROWS, 8, 8, 4))
    sizes = jnp.tile(jnp.asarray([[64.0, 64, 0, 0, 16, 16]]), (ROWS, 1)) if components.is_xl else None
    ids = tuple(map(jnp.asarray, base.prompts.tokenize(CAPTIONS)))
    batch = {"latents": latents, "ids": ids, "sizes": sizes, "indices": jnp.arange(ROWS)}
    empty = tuple(map(jnp.asarray, base.prompts.tokenize([""])))
    loss = denoising.make_loss(base, STAGE)
    trained = {name: params[name] for name in ("unet", *components.text_encoders)}
    found, _ = jax.jit(lambda t: loss({"student": t}, None, {"empty": empty}, batch, key))(trained)

    cond = base.encode_prompts(params, ids)
    nothing = base.encode_prompts(params, tuple(jnp.tile(row, (ROWS, 1)) for row in empty))
    if components.is_xl:
        nothing = jax.tree.map(jnp.zeros_like, nothing)
    context, pooled = np.array(cond.context), None if cond.pooled is None else np.array(cond.pooled)
    for row in np.flatnonzero(drawn.dropped):
        context[row] = nothing.context[row]
        if pooled is not None:
            pooled[row] = nothing.pooled[row]
    extra = {"pooled": jnp.asarray(pooled), "time_ids": sizes} if components.is_xl else {}
    a, b = (np.asarray(each, np.float64)[np.asarray(drawn.t)] for each in (base.schedule.alpha, base.schedule.sigma))
    column = (ROWS, 1, 1, 1)
    x = (a.reshape(column) * latents + b.reshape(column) * drawn.eps).astype(np.float32)
    output = jax.jit(components.unet)(params["unet"], x, drawn.t, jnp.asarray(context), **extra)
    errors = np.mean((np.asarray(output, np.float64) - drawn.eps) ** 2, axis=(1, 2, 3))
    snr = (a / b) ** 2
    np.testing.assert_allclose(found, np.mean(np.minimum(snr, 5.0) / snr * errors), rtol=1e-4)
