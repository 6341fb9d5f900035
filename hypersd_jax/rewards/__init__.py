"""Scores of images against their prompts, differentiable in the images."""

from __future__ import annotations

from hypersd_jax.rewards.clip_score import ClipModel as ClipModel
from hypersd_jax.rewards.clip_score import clip_scores as clip_scores
from hypersd_jax.rewards.clip_score import load_clip as load_clip
from hypersd_jax.rewards.contents import contents_digest as contents_digest
from hypersd_jax.rewards.preprocess import ImageSteps as ImageSteps
from hypersd_jax.rewards.preprocess import preprocess as preprocess
from hypersd_jax.rewards.registry import REWARDS as REWARDS
from hypersd_jax.rewards.registry import Reward as Reward
from hypersd_jax.rewards.registry import load as load
from hypersd_jax.rewards.registry import register_reward as register_reward
from hypersd_jax.rewards.reward import LoadedReward as LoadedReward
from hypersd_jax.rewards.reward import RewardModel as RewardModel
