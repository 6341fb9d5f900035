"""AdamW with clipping and warm-up, whose numbers that differ between stages are arrays.

The learning rate, the warm-up and the schedule enter the compiled step through `controls`, so that stages which differ
only in them share one compiled program; the moments' constants are part of the program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypersd_jax.errors import UserError

Controls = dict[str, Any]
"""Small arrays that steer the step: those of `optimizer_controls`, `ema_decay`, and whatever the loss reads; of several
players, "players": those of each one's optimizer."""

SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) and its learning-rate schedule.

    Attributes:
        learning_rate: the rate after warm-up.
        warmup_steps: updates over which the rate rises linearly from 0; 0 starts at the full rate.
        schedule: what follows the warm-up, down to 0 at the stage's last update for `cosine` and `linear`.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, times the learning rate.
        clip_norm: largest global gradient norm; None does not clip.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        checks = {
            "learning_rate": self.learning_rate >= 0,
            "warmup_steps": self.warmup_steps >= 0,
            "schedule": self.schedule in SCHEDULES,
            "beta1": 0 <= self.beta1 < 1,
            "beta2": 0 <= self.beta2 < 1,
            "eps": self.eps > 0,
            "weight_decay": self.weight_decay >= 0,
            "clip_norm": self.clip_norm is None or self.clip_norm > 0,
        }
        for key, good in checks.items():
            if not good:
                raise UserError(f"optimizer: {key}={getattr(self, key)!r} is out of range")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip, precondition, decay: the update before the learning rate, which the step multiplies in from `controls`."""
    parts = [optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    return optax.chain(*parts)


def optimizer_controls(config: OptimizerConfig, updates: int) -> Controls:
    """The part of `controls` that `learning_rate_at` reads, for a stage of `updates` updates."""
    return {
        "learning_rate": np.asarray(config.learning_rate, np.float32),
        "warmup_steps": np.asarray(config.warmup_steps, np.float32),
        "updates": np.asarray(updates, np.float32),
        "schedule": np.asarray(SCHEDULES.index(config.schedule), np.int32),
    }


def learning_rate_at(controls: Controls, step: jax.Array | int) -> jax.Array:
    """The learning rate of the update that follows `step` finished ones, float32.

    Warm-up gives update n (counted from 1) n/warmup_steps of the rate; the decay runs over the updates after it.
    """
    done = jnp.asarray(step, jnp.float32)
    warmup = jnp.asarray(controls["warmup_steps"], jnp.float32)
    rise = jnp.minimum(1.0, (done + 1.0) / jnp.maximum(warmup, 1.0))
    progress = jnp.clip((done - warmup) / jnp.maximum(controls["updates"] - warmup, 1.0), 0.0, 1.0)
    decays = jnp.stack([jnp.ones_like(progress), 0.5 * (1.0 + jnp.cos(jnp.pi * progress)), 1.0 - progress])
    return jnp.asarray(controls["learning_rate"], jnp.float32) * rise * decays[controls["schedule"]]
