"""The settings of the stages that train a model's own weights: the autoencoder, and the teacher."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from hypersd_jax.config.stage import StageConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderStage(StageConfig):
    """Training of the autoencoder: L1 between image and reconstruction, plus weighted terms.

    Attributes:
        kind: says which kind of stage this is.
        part: ``decoder`` leaves the latents, and every UNet that was trained on them, as they are (the released
            "ft-mse" autoencoders of SD 1.x were made so).
        gradient_weight: of the L1 between horizontal and vertical differences, which keeps edges sharp.
        kl_weight: of the Kullback-Leibler divergence of the latents from N(0, I).
    """

    trains_adapter: ClassVar[bool] = False

    kind: Literal["autoencoder"]
    part: Literal["all", "decoder"] = "all"
    gradient_weight: float = 1.0
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_weight < 0 or self.kl_weight < 0:
            raise ValueError("gradient_weight and kl_weight must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherStage(StageConfig):
    """Ordinary training of UNet and text encoders to predict noise, or what the scheduler's prediction type says.

    Attributes:
        kind: says which kind of stage this is.
        prediction_type: what the UNet predicts from this stage on, and the model says of itself: weights that predict
            epsilon are fine-tuned to predict v, which needs no division by alpha at the noisy end (arXiv 2202.00512,
            section 4). null: what it predicts now.
        snr_gamma: gamma of min-SNR weighting (arXiv 2303.09556); null: all timesteps alike.
        prompt_dropout: share of examples without their caption, for classifier-free guidance.
    """

    trains_adapter: ClassVar[bool] = False

    kind: Literal["teacher"]
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    snr_gamma: float | None = 5.0
    prompt_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"snr_gamma must be above 0, not {self.snr_gamma}")
        if not 0.0 <= self.prompt_dropout < 1.0:
            raise ValueError(f"prompt_dropout must lie in [0, 1), not {self.prompt_dropout}")
