"""The rewards of a stage with feedback: loaded, given their prompts, their margins measured, their term of the loss."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.bases import TextToImage
from hypersd_jax.config import FeedbackConfig, GeneratorStage
from hypersd_jax.distill import feedback_gradient, feedback_loss
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.scorer_reward import EMBEDDED_REWARDS, PREFIX, embedded_reward
from hypersd_jax.inputs.batches import Reading, nothing
from hypersd_jax.rewards import LoadedReward, Reward, load
from hypersd_jax.stages.context import Run
from hypersd_jax.training import Metrics, replicated
from hypersd_jax.weights.tensors import replacing

TOKENS = "reward_tokens"
"""Key of a batch: the tokens of its captions, one entry for each reward."""

TEACHER_STEPS = 20
"""DDIM steps of the teacher's images whose mean reward is a margin; UniFL's sampler (arXiv 2404.05595)."""


class FrozenFeedback(NamedTuple):
    """Arrays of the feedback that the training step reads and never changes."""

    params: tuple[Any, ...]  # by reward
    margins: Any  # (R,) float32
    autoencoder: Any  # parameters of the decoder


@functools.cache
def open_reward(name: str, path: str | None) -> Reward:
    """Load a reward once.

    Raises:
        UserError: no reward has this name, or its weights are missing or at fault.
    """
    if name.startswith(PREFIX):
        if name not in EMBEDDED_REWARDS:
            raise UserError(f"{name!r} is not a reward; the embedded ones are {', '.join(EMBEDDED_REWARDS)}")
        if path is not None:
            raise UserError(f"path={path}: {name} has weights of its own")
        return embedded_reward(name)
    if path is None:
        raise UserError(f"path is missing: the weights of {name}")
    return load(name, path)


def open_trainable(name: str, path: str | None) -> LoadedReward:
    """Load a reward that a training step can differentiate; UserError for one that only scores."""
    reward = open_reward(name, path)
    if not isinstance(reward, LoadedReward):
        raise UserError(f"{name!r} scores images but cannot be trained on: it is no hypersd_jax.rewards.LoadedReward")
    return reward


def require_rewards(stage: GeneratorStage, config: FeedbackConfig) -> None:
    """Refuse (UserError) rewards, or a judge, that cannot be loaded."""
    needed: list[tuple[str, Any, Any]] = [
        (f"rewards.{index}", open_trainable, each) for index, each in enumerate(config.rewards)
    ]
    if config.guards and config.guards.judge:
        needed.append(("guards.judge", open_reward, config.guards.judge))
    for key, opened, settings in needed:
        try:
            opened(settings.name, settings.path)
        except UserError as error:
            raise UserError(f"stages.{stage.name}.feedback.{key}: {error}") from None


def tokens_of(config: FeedbackConfig | None) -> Reading:
    """Make the function that reads a batch's captions for the rewards; without feedback it reads nothing."""
    if config is None:
        return nothing
    rewards = [open_trainable(each.name, each.path) for each in config.rewards]
    return lambda captions: {TOKENS: tuple(reward.tokenize(captions) for reward in rewards)}


def frozen_feedback(run: Run, stage: GeneratorStage, config: FeedbackConfig) -> FrozenFeedback:
    """Collect what the term reads; margins that the recipe leaves open are measured, or read back."""
    params = tuple(open_trainable(each.name, each.path).params for each in config.rewards)
    return FrozenFeedback(
        params=jax.device_put(params, replicated(run.mesh)),  # once, not at every step
        margins=np.asarray(_margins(run, stage, config), np.float32),
        autoencoder=dict(run.base.params[run.base.autoencoder]),
    )


def feedback_term(
    base: TextToImage, config: FeedbackConfig, frozen: FrozenFeedback, x0: jax.Array, batch: Any
) -> tuple[jax.Array, Metrics]:
    """Compute the rewards' term of the loss and its metrics, from the student's clean latents x0 (B, h, w, C).

    The decoder's activations are computed again in the backward pass: at 1024 px they are larger than the UNet's.
    """

    @jax.checkpoint
    def decode(latents: jax.Array) -> jax.Array:
        return base.decode(frozen.autoencoder, base.unscale(latents)).astype(jnp.float32) * 0.5 + 0.5

    rewards = [
        functools.partial(open_trainable(each.name, each.path).model, params, ids=ids)
        for each, params, ids in zip(config.rewards, frozen.params, batch[TOKENS], strict=True)
    ]
    images, weights = decode(x0), jnp.stack([jnp.asarray(each.weight) for each in config.rewards])
    found = feedback_gradient(rewards, images, frozen.margins, weights, balanced=config.balanced)
    metrics: Metrics = {"feedback": found.hinge}
    for index in range(len(rewards)):
        mark = suffix(index)
        metrics[f"reward{mark}"] = jnp.mean(found.scores[index])
        metrics[f"below_margin{mark}"] = jnp.mean(found.below[index].astype(jnp.float32))
    return feedback_loss(images, found), metrics


def suffix(index: int) -> str:
    """Name the metrics of the rewards: the first one's have no suffix, then come ``_2``, ``_3``, ..."""
    return f"_{index + 1}" if index else ""


def score_images(name: str, path: str | None, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Score images (N, H, W, 3) in 0..1 on the host, (N,) float64."""
    return np.asarray(open_reward(name, path)(images, prompts), np.float64)


def fixed_prompts(run: Run, images: int) -> tuple[list[str], int]:
    """List the run's preview prompts, and how many images of each make ``images`` or more."""
    return list(run.preview_prompts), math.ceil(images / len(run.preview_prompts))


def repeated(prompts: Sequence[str], count: int) -> list[str]:
    """Repeat each prompt for its images, in the order in which a pipeline returns them."""
    return [prompt for prompt in prompts for _ in range(count)]


def _margins(run: Run, stage: GeneratorStage, config: FeedbackConfig) -> list[float]:
    """Return the margins: the recipe's, else the mean reward of the teacher's images, kept with the checkpoints."""
    if all(each.margin is not None for each in config.rewards):
        return [float(each.margin) for each in config.rewards if each.margin is not None]
    path = run.output.checkpoints(stage.name) / "margins.json"
    if path.exists():
        found: list[float] = json.loads(path.read_text(encoding="utf-8"))
        return found
    prompts, count = fixed_prompts(run, config.guards.images if config.guards else 32)
    images = np.asarray(
        run.pipe(
            prompts,
            num_images=count,
            steps=TEACHER_STEPS,
            sampler="ddim",
            guidance=float(stage.guidance),
            output="np",
            batch_size=run.config.evaluation.batch_size,
            stepwise=True,
        )
    )
    texts = repeated(prompts, count)
    found = [
        float(np.mean(score_images(each.name, each.path, images, texts))) if each.margin is None else each.margin
        for each in config.rewards
    ]
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")
    return found
