"""One class for each kind of stage."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hypersd_jax.config.score import AdversarialConfig, ScoreStage
from hypersd_jax.config.stage import StageConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyStage(StageConfig):
    """One stage of trajectory-segmented consistency distillation (arXiv 2404.13686, Algorithm 1), or of a rival.

    ``kind`` is ``tscd``, or for comparison ``tcd`` (arXiv 2402.19159: TSCD's one-segment loss, trained from the start),
    ``lcm`` (arXiv 2310.04378: the loss between two estimates of x_0) or ``pcm`` (arXiv 2405.18407: t_end is always the
    edge of its phase; its adversarial term is ``adversarial``). ``k`` is the number of segments, 1 for ``tcd`` and
    ``lcm``, and ``solver_steps`` the size N of the teacher's DDIM grid; ``guidance`` is the range, in diffusers'
    ``guidance_scale``, that the teacher's guidance is drawn from; the target network is the moving average;
    ``teacher`` chooses between the two readings of the paper: the guided base model in every stage, or the previous
    stage's student. ``distance_weight`` and ``adversarial.weight`` weigh the two terms of the distance (section 3.1).

    A guidance of [1, 1] leaves the teacher unguided and spares half its calls; with ``prompt_dropout``, the share of
    empty prompts, the student then follows the conditional and the unconditional field apart, and guidance and negative
    prompts keep working on it (PCM's ``not_apply_cfg_solver``; Hyper-SD's later CFG LoRAs).

    ``sampler`` (``auto``: that of the method, ddim for ``tscd`` and ``pcm``), ``eta`` and ``sample_guidance`` go into
    the header of the exported file, so that it samples itself as it was trained.
    """

    kind: Literal["tscd", "tcd", "lcm", "pcm"] = "tscd"
    k: int
    solver_steps: int = 40
    guidance: tuple[float, float] = (3.0, 8.0)
    teacher: Literal["base", "previous"] = "base"
    distance: Literal["mse", "pseudo_huber"] = "mse"
    huber_c: float = 0.001
    distance_weight: float = 1.0
    adversarial: AdversarialConfig | None = None
    offset_noise: float = 0.0
    prompt_dropout: float = 0.0
    sampler: Literal["auto", "ddim", "tcd", "lcm"] = "auto"
    eta: float = 0.0
    sample_guidance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("k", "solver_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.kind in ("tcd", "lcm") and self.k != 1:
            raise ValueError(f"k must be 1 for kind={self.kind}, which has no segments, not {self.k}")
        if self.solver_steps % self.k:
            raise ValueError(f"solver_steps ({self.solver_steps}) must be a multiple of k ({self.k})")
        if self.offset_noise < 0:
            raise ValueError(f"offset_noise must not be negative, not {self.offset_noise}")
        if self.distance_weight < 0 or (self.distance_weight != 1.0 and not self.adversarial):
            raise ValueError("distance_weight must not be negative, and is 1 where no adversarial term is beside it")
        if self.adversarial and self.kind == "lcm":
            raise ValueError("adversarial: kind=lcm compares clean estimates and has no segment to judge in")
        if not 0.0 <= self.prompt_dropout < 1.0:
            raise ValueError(f"prompt_dropout must lie in [0, 1), not {self.prompt_dropout}")
        if self.sample_guidance < 0:
            raise ValueError(f"sample_guidance must not be negative, not {self.sample_guidance}")
        if self.huber_c <= 0:
            raise ValueError(f"huber_c must be above 0, not {self.huber_c}")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in 0..1, not {self.eta}")
        low, high = self.guidance
        if low > high or low < 1:
            raise ValueError(f"guidance must be a range [low, high] with 1 <= low <= high, not [{low}, {high}]")
        if self.sampler == "auto":  # settled here, so that the run's record says which
            object.__setattr__(self, "sampler", {"tcd": "tcd", "lcm": "lcm"}.get(self.kind, "ddim"))

    @property
    def learns_nothing(self) -> bool:
        """Whether a student that starts at the base is there already: t_end is t_{n-1}, which its own step reaches."""
        return self.kind != "lcm" and self.solver_steps == self.k and self.guidance == (1.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderStage(StageConfig):
    """Training of the autoencoder: L1 between picture and reconstruction, plus weighted terms.

    ``part`` is ``all`` of it, or ``decoder``: the latents stay what they were, and with them every UNet that was
    trained on them (the released "ft-mse" autoencoders of SD 1.x were made so).
    ``gradient_weight`` is of the L1 between their horizontal and vertical differences, which keeps edges sharp;
    ``kl_weight`` of the Kullback-Leibler divergence of the latents from N(0, I), a number of a picture's latents, which
    the decoder alone does not change.
    """

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
    ``prompt_dropout`` is the share of pictures that are shown without their caption, for classifier-free guidance.
    """

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


AdapterStage = ConsistencyStage | ScoreStage
"""Those that start from a frozen base."""

AnyStage = ConsistencyStage | ScoreStage | AutoencoderStage | TeacherStage
"""Told apart by ``kind``; without one it is the first."""
