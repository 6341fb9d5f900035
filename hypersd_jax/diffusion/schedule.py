"""The noise schedule: alpha(t) and sigma(t) of the forward process x_t = alpha_t x_0 + sigma_t eps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hypersd_jax.diffusion.names import require_name
from hypersd_jax.diffusion.registry import SOLVERS
from hypersd_jax.errors import UserError, shown

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

MOST_TIMESTEPS = 100_000
"""Of one schedule, whose tables are made whole; Stable Diffusion has 1000."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A variance-preserving schedule over T = `num_train_timesteps` integer timesteps, 0 (almost clean) to T - 1.

    Equality and hash go by the settings alone, so a schedule can be a static argument of `jax.jit`. Index 0 of the
    arrays is timestep 0, which is *not* clean: abar_0 is 0.99915 for Stable Diffusion.

    Attributes:
        num_train_timesteps: T.
        beta_start: beta at t = 0.
        beta_end: beta at t = T - 1.
        beta_schedule: one of BETA_SCHEDULES.
        trained_betas: the T betas themselves; overrides the three above.
        prediction_type: what the network outputs, one of PREDICTION_TYPES.
        set_alpha_to_one: the DDIM step that leaves the schedule lands on abar = 1 (True) or on abar_0 (False).
        steps_offset: added to the timesteps of "leading" spacing.
        clip_sample: clamp the x_0 prediction to +-clip_sample_range at each sampling step.
        clip_sample_range: the bound.
        rescale_betas_zero_snr: shift and scale alpha so that alpha_{T-1} = 0 (arXiv 2305.08891, Algorithm 1).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        steps = self.num_train_timesteps
        if not 1 <= steps <= MOST_TIMESTEPS:
            raise UserError(f"scheduler_config: num_train_timesteps must be in 1..{MOST_TIMESTEPS}, not {steps}")
        if not -steps <= self.steps_offset <= steps:
            raise UserError(f"scheduler_config: steps_offset={self.steps_offset} leads out of the {steps} timesteps")
        require_name("scheduler_config: prediction_type", self.prediction_type, PREDICTION_TYPES)
        require_name("scheduler_config: beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise UserError(
                f"scheduler_config: trained_betas has {len(self.trained_betas)} values, "
                f"num_train_timesteps is {self.num_train_timesteps}"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError(
                "scheduler_config: rescale_betas_zero_snr=true needs prediction_type v_prediction or sample: "
                "at alpha = 0 an epsilon prediction says nothing about x_0"
            )
        if not self.clip_sample_range > 0:
            raise UserError(f"scheduler_config: clip_sample_range must be positive, not {self.clip_sample_range}")
        self._require_noise()

    def _require_noise(self) -> None:
        """Refuse betas that no table can be made of."""
        given: dict[str, tuple[float, ...]] = {}
        if self.trained_betas is not None:
            given = {"trained_betas": self.trained_betas}
        elif self.beta_schedule != "squaredcos_cap_v2":
            given = {"beta_start": (self.beta_start,), "beta_end": (self.beta_end,)}
        for key, betas in given.items():
            for beta in betas:
                if not 0 < beta < 1:
                    raise UserError(f"scheduler_config: {key} must be above 0 and below 1, not {beta}")
        # Solvers divide by alpha, except at the last timestep of a schedule that was rescaled to end there at 0.
        last = -1 if self.rescale_betas_zero_snr else None
        if self.num_train_timesteps + (last or 0) < 1 or not np.all(self.alpha[:last] > 0):
            keys = ", ".join(given) or "beta_schedule"
            raise UserError(f"scheduler_config: {keys} over {self.num_train_timesteps} timesteps leaves alpha = 0")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, solver: str | None = None) -> Schedule:
        """The schedule that a diffusers scheduler_config.json describes, whatever scheduler class wrote it.

        Args:
            config: the parsed file. Keys that belong to one sampler only are not read here.
            solver: a key of `SOLVERS`: absent keys take the defaults of that solver's class in diffusers, as
                `XScheduler.from_config(pipe.scheduler.config)` does. None: the dataclass defaults.

        Raises:
            UserError: a setting that is unknown, malformed, or not honoured (`thresholding`, flow matching).
        """
        class_name = str(config.get("_class_name", ""))
        if class_name.startswith("FlowMatch"):
            raise UserError(f"scheduler_config: _class_name={class_name} is a flow-matching schedule, not supported")
        if config.get("thresholding"):
            raise UserError("scheduler_config: thresholding=true is not supported (it is unsuitable for latents)")
        defaults = SOLVERS[solver].defaults if solver is not None else {}
        settings: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = config.get(field.name, defaults.get(field.name))
            if value is not None:
                settings[field.name] = _cast(field.name, value)
        return cls(**settings)

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t = prod_{s<=t} (1 - beta_s), float64 (T,)."""
        steps = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas, np.float64)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, steps, dtype=np.float64)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, steps, dtype=np.float64) ** 2
        else:
            edges = np.arange(steps + 1, dtype=np.float64) / steps
            abar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
        abar = np.cumprod(1 - betas)
        if self.rescale_betas_zero_snr:
            root = np.sqrt(abar)
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        abar.flags.writeable = False
        return abar

    @functools.cached_property
    def alpha(self) -> np.ndarray:
        """alpha_t = sqrt(abar_t), float32 (T,)."""
        return np.sqrt(self.alphas_cumprod).astype(np.float32)

    @functools.cached_property
    def sigma(self) -> np.ndarray:
        """sigma_t = sqrt(1 - abar_t), float32 (T,)."""
        return np.sqrt(1 - self.alphas_cumprod).astype(np.float32)

    @property
    def final_alpha_cumprod(self) -> float:
        """abar at the end of a DDIM trajectory, one step before t = 0: 1 or abar_0, by `set_alpha_to_one`."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])


def _cast(name: str, value: Any) -> Any:
    """A JSON value as the type that the field of Schedule holds."""
    kinds: dict[str, Callable[[Any], Any]] = {"beta_schedule": str, "prediction_type": str}
    kinds |= dict.fromkeys(("num_train_timesteps", "steps_offset"), int)
    kinds |= dict.fromkeys(("set_alpha_to_one", "clip_sample", "rescale_betas_zero_snr"), bool)
    try:
        if name == "trained_betas":
            return tuple(float(beta) for beta in value)
        return kinds.get(name, float)(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"scheduler_config: {name} has the unreadable value {shown(value)}") from None
