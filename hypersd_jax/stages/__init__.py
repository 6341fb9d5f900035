"""Training stages: the only package that ties losses to models and data."""

from hypersd_jax.config import (
    AutoencoderStage,
    ConsistencyStage,
    FeedbackStage,
    LoraStage,
    RegressionStage,
    ScoreStage,
    TeacherStage,
)
from hypersd_jax.stages import autoencoder, consistency, denoising, distribution_matching, feedback, regression, style
from hypersd_jax.stages.kinds import register as register
from hypersd_jax.stages.run import train as train

register(ConsistencyStage, consistency)
register(ScoreStage, distribution_matching)
register(RegressionStage, regression)
register(FeedbackStage, feedback)
register(LoraStage, style)
register(TeacherStage, denoising)
register(AutoencoderStage, autoencoder)
