"""What the stages are told that train a model's own weights: the autoencoder, and ordinary training of the teacher."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from hypersd_jax.config.stage import StageConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderStage(StageConfig):
    """Training of the autoencoder: L1 between image and reconstruction, plus weighted terms.

    ``part`` is ``all`` of it, or ``decoder``: the latents stay what they were, and with them every UNet that was
    trained on them (the released "ft-mse" autoencoders of SD 1.x were made so).
    ``gradient_weight`` is of the L1 between their horizontal and vertical differences, which keeps edges sharp;
    ``kl_weight`` of the Kullback-Leibler divergence of the latents from N(0, I), a number of a image's latents, which
    the decoder alone does not change.
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
    """Ordinary training of UNet and text encoder to predict noise, or what the scheduler's prediction type says.

    ``prediction_type`` makes it another from this stage on, which the model that comes out says of itself: weights that
    predict epsilon are fine-tuned to predict v, which needs no division by alpha at the noisy end (arXiv 2202.00512,
    section 4). ``snr_gamma`` is min-SNR weighting's gamma (arXiv 2303.09556; null weighs all times alike);
    ``prompt_dropout`` is the share of images that are shown without their caption, for classifier-free guidance.
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
