"""The rewards of a stage with feedback: loaded, given their prompts, their margins measured, their term of the loss."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.bases import TextToImage
from hypersd_jax.config import FeedbackConfig, GeneratorStage, GuardConfig
from hypersd_jax.config.feedback import suffix
from hypersd_jax.distill import feedback_gradient, feedback_loss
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.samples import image_features
from hypersd_jax.evaluation.scorer_reward import EMBEDDED_REWARDS, PREFIX, embedded_reward
from hypersd_jax.files import read_prompts
from hypersd_jax.inputs.batches import Reading, nothing
from hypersd_jax.rewards import LoadedReward, Reward, load
from hypersd_jax.stages.context import Run
from hypersd_jax.training import Metrics, replicated
from hypersd_jax.training.first_process import from_first, wait_for_all
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
    """Refuse (UserError) rewards, judges or prompts that cannot be loaded."""
    needed: list[tuple[str, Callable[[], Any]]] = [
        (f"rewards.{index}", functools.partial(open_trainable, each.name, each.path))
        for index, each in enumerate(config.rewards)
    ]
    if config.guards:
        needed += [
            (f"guards.judges.{index}", functools.partial(open_reward, each.name, each.path))
            for index, each in enumerate(config.guards.judges)
        ]
        if config.guards.prompts is not None:
            needed.append(("guards.prompts", functools.partial(_prompts_of, Path(config.guards.prompts))))
    for key, opened in needed:
        try:
            opened()
        except UserError as error:
            raise UserError(f"stages.{stage.name}.feedback.{key}: {error}") from None


def tokens_of(config: FeedbackConfig | None) -> Reading:
    """Make the function that reads a batch's captions for the rewards; without feedback it reads nothing."""
    if config is None:
        return nothing
    rewards = [open_trainable(each.name, each.path) for each in config.rewards]
    return lambda captions, images: {TOKENS: tuple(reward.tokenize(captions) for reward in rewards)}


def frozen_feedback(run: Run, stage: GeneratorStage, config: FeedbackConfig) -> FrozenFeedback:
    """Collect what the term reads; margins that the recipe leaves open are measured, or read back."""
    params = tuple(open_trainable(each.name, each.path).params for each in config.rewards)
    return FrozenFeedback(
        params=jax.device_put(params, replicated(run.mesh)),  # once, not at every step
        margins=margins(run, stage, config),
        autoencoder=dict(run.base.params[run.base.autoencoder]),
    )


def feedback_term(
    base: TextToImage, config: FeedbackConfig, frozen: FrozenFeedback, x0: Sequence[jax.Array], batch: Any
) -> tuple[jax.Array, Metrics]:
    """Compute the rewards' term of the loss and its metrics, the mean over the student's clean latents.

    ``x0`` are one or several estimates (B, h, w, C) of each sample.
    """
    rewards = [
        functools.partial(open_trainable(each.name, each.path).model, params, ids=jnp.repeat(ids, len(x0), axis=0))
        for each, params, ids in zip(config.rewards, frozen.params, batch[TOKENS], strict=True)
    ]
    latents = jnp.stack(x0, axis=1)  # a sample's estimates side by side, as a split batch wants them
    latents = latents.reshape(-1, *latents.shape[2:])
    images = decoded_images(base, frozen, latents)
    weights = jnp.stack([jnp.asarray(each.weight) for each in config.rewards])
    found = feedback_gradient(rewards, images, frozen.margins, weights, balanced=config.balanced)
    metrics: Metrics = {"feedback": found.hinge}
    for index in range(len(rewards)):
        mark = suffix(index)
        metrics[f"reward{mark}"] = jnp.mean(found.scores[index])
        metrics[f"below_margin{mark}"] = jnp.mean(found.below[index].astype(jnp.float32))
    return feedback_loss(images, found), metrics


def decoded_images(base: TextToImage, frozen: FrozenFeedback, latents: jax.Array) -> jax.Array:
    """Decode clean latents (B, h, w, C) to images (B, H, W, 3), 0..1 but for what the decoder overshoots.

    The decoder's activations are computed again in the backward pass: at 1024 px they are larger than the UNet's.
    """

    @jax.checkpoint
    def decode(latents: jax.Array) -> jax.Array:
        return base.decode(frozen.autoencoder, base.unscale(latents)).astype(jnp.float32) * 0.5 + 0.5

    return decode(latents)


def score_images(name: str, path: str | None, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Score images (N, H, W, 3) in 0..1 on the host, (N,) float64."""
    return np.asarray(open_reward(name, path)(images, prompts), np.float64)


def fixed_prompts(run: Run, guards: GuardConfig | None) -> tuple[list[str], int]:
    """List the guard's prompts, else the run's preview prompts, and how many images are sampled of each."""
    guards = guards or GuardConfig()
    prompts = list(run.preview_prompts) if guards.prompts is None else _prompts_of(Path(guards.prompts))
    return prompts, math.ceil(guards.images / len(prompts))


def _prompts_of(path: Path) -> list[str]:
    try:
        return read_prompts(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def repeated(prompts: Sequence[str], count: int) -> list[str]:
    """Repeat each prompt for its images, in the order in which a pipeline returns them."""
    return [prompt for prompt in prompts for _ in range(count)]


class TeacherFigures(NamedTuple):
    """What is measured once, before the stage, on the teacher's images."""

    rewards: np.ndarray  # (R,) float32, the mean of each, of the run's preview prompts
    features: np.ndarray  # (N, 1280) float32, of the prompts that are watched
    watched: np.ndarray  # () str, a digest of these prompts


def margins(run: Run, stage: GeneratorStage, config: FeedbackConfig) -> np.ndarray:
    """Return the margins (R,) float32: the recipe's, else the mean reward of the teacher's images."""
    given = [each.margin for each in config.rewards]
    if None not in given:
        return np.asarray(given, np.float32)
    measured = teacher_figures(run, stage, config).rewards
    found = [mean if margin is None else margin for margin, mean in zip(given, measured, strict=True)]
    return np.asarray(found, np.float32)


def teacher_figures(run: Run, stage: GeneratorStage, config: FeedbackConfig) -> TeacherFigures:
    """Sample and measure the teacher; the figures are kept with the checkpoints."""
    path = run.output.checkpoints(stage.name) / "teacher.npz"
    digest = hashlib.sha256(json.dumps(fixed_prompts(run, config.guards)).encode()).hexdigest()
    if from_first(path.exists()):
        with np.load(path, allow_pickle=False) as file:
            found = TeacherFigures(*(file[name] for name in TeacherFigures._fields))
        if str(found.watched) != digest:
            raise UserError(f"stages.{stage.name}.feedback.guards: its prompts are not those that {path} was made of")
        return found
    watched, images = _teacher_images(run, stage, config.guards)
    texts, features = watched, image_features(to_bytes(images))
    if config.guards is not None and config.guards.prompts is not None:
        # A margin is of what the stage is trained on, whatever is watched.
        texts, images = _teacher_images(run, stage, dataclasses.replace(config.guards, prompts=None))
    means = [np.mean(score_images(each.name, each.path, images, texts)) for each in config.rewards]
    found = TeacherFigures(np.asarray(means, np.float32), features, np.asarray(digest))
    if jax.process_index() == 0:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **found._asdict())
    wait_for_all()
    return found


def _teacher_images(run: Run, stage: GeneratorStage, guards: GuardConfig | None) -> tuple[list[str], np.ndarray]:
    """Sample the teacher: (the prompt of each image, images (N, H, W, 3) in 0..1)."""
    prompts, count = fixed_prompts(run, guards)
    images = run.pipe(
        prompts,
        num_images=count,
        steps=TEACHER_STEPS,
        sampler="ddim",
        guidance=float(stage.guidance),
        output="np",
        batch_size=run.config.evaluation.batch_size,
        stepwise=True,
    )
    return repeated(prompts, count), np.asarray(images)


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Round images (N, H, W, 3) in 0..1 to uint8."""
    return np.round(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)
