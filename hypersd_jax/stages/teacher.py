"""The stage `teacher`: UNet and text encoder learn to denoise the frozen autoencoder's latents."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.conditioning import Conditioning, PromptEncoder
from hypersd_jax.config import TeacherStage
from hypersd_jax.diffusion import Schedule
from hypersd_jax.distill import corruption, denoising_loss
from hypersd_jax.stages.networks import with_dropped
from hypersd_jax.training import Controls, LossFunction
from hypersd_jax.weights.components import Components


def make_loss(
    components: Components, prompts: PromptEncoder, schedule: Schedule, stage: TeacherStage, dtype: Any
) -> LossFunction:
    """The stage's loss for `make_step`.

    Trainable {"unet": ..., "text_encoder": ..., ...}; frozen {"empty": ids of the empty prompt, a tuple of (1, S)};
    batch {"latents", "ids", "time_ids", "places"}. A dropped caption becomes the empty one, or zeros where the model's
    unconditional is zeros (SDXL).
    """

    def loss(
        trainable: Any, ema: Any, frozen: Any, batch: Any, key: jax.Array, controls: Controls
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        latents = batch["latents"]
        drawn = corruption(
            key,
            latents.shape,
            batch["places"],
            times=schedule.num_train_timesteps,
            prompt_dropout=stage.prompt_dropout,
        )
        ids = batch["ids"]
        if not components.zero_unconditional:
            ids = jax.tree.map(lambda rows, empty: jnp.where(drawn.dropped[:, None], empty, rows), ids, frozen["empty"])
        cond = prompts.encode(trainable, ids, dtype=dtype)
        if components.zero_unconditional:
            cond = with_dropped(cond, jax.tree.map(jnp.zeros_like, cond), drawn.dropped)
        cond = cond._replace(time_ids=batch["time_ids"])

        def predict(x: jax.Array, t: jax.Array, given: Conditioning) -> jax.Array:
            return components.unet(trainable["unet"], x, t, given.context, **given.unet_kwargs())

        return denoising_loss(predict, latents, cond, drawn, schedule=schedule, snr_gamma=stage.snr_gamma)

    return loss
