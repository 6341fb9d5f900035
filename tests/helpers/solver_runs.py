"""One tiny network sampled by our tables and by diffusers' schedulers, from the same latents and noise."""

from __future__ import annotations

import functools
import importlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from hypersd_jax.diffusion import advance, sample

SHAPE = (2, 4, 4, 4)
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
CONFIGS = {
    "sd15": {
        "_class_name": "PNDMScheduler",
        **SD_BETAS,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    "sd21": {
        "_class_name": "DDIMScheduler",
        **SD_BETAS,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        **SD_BETAS,
        "clip_sample": False,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    },
    "saved_euler": {  # what EulerDiscreteScheduler.save_pretrained writes: no clip_sample, no set_alpha_to_one
        "_class_name": "EulerDiscreteScheduler",
        **SD_BETAS,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
        "timestep_type": "discrete",
    },
    "linear": {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "clip_sample": False},
    "cosine": {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    "zero_snr": {**SD_BETAS, "clip_sample": False, "rescale_betas_zero_snr": True, "set_alpha_to_one": False},
    "clipped": {**SD_BETAS, "clip_sample": True, "clip_sample_range": 0.7, "set_alpha_to_one": False},
}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "tcd": "TCDScheduler",
    "lcm": "LCMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
MIX = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) * 0.5


def network(xp, x, t):
    """A tiny nonlinear model, the same floating-point operations in PyTorch and JAX."""
    return xp.tanh(x @ xp.asarray(MIX) + 0.3 * xp.sin(t / 100.0).reshape(-1, 1, 1, 1)) * 0.8


def predict(x, t):
    return network(jnp, x, t.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="prediction_type")
def ours(table, latents, noise, prediction_type, clean=None, known=None):
    """The last latents of our scan; `clean` and `known` as `sample` takes them."""
    with jax.numpy_rank_promotion("allow"), jax.default_matmul_precision("highest"):
        return sample(predict, table, latents, noise, prediction_type=prediction_type, clean=clean, known=known)


@jax.jit
def one_step(row, state, noise):
    """The state after one row of a table, for an epsilon prediction."""
    with jax.numpy_rank_promotion("allow"), jax.default_matmul_precision("highest"):
        return advance(predict, row, state, noise, prediction_type="epsilon")


def make_scheduler(name, config, **overrides):
    return getattr(diffusers, SCHEDULERS[name]).from_config(dict(config), **overrides)


def theirs(scheduler, latents, noise, monkeypatch, eta=None, *, timesteps=None, clean=None, known=None):
    """The latents after each step of diffusers' pipelines' loop, with our noise instead of its own.

    Channels last: schedulers are elementwise. `timesteps` are those left of the scheduler's for an image to start
    from, `clean`, or for none; `known` is put back after each step as its inpainting pipelines do.
    """
    module = importlib.import_module(type(scheduler).__module__)
    x, rows, trajectory = torch.from_numpy(latents), [torch.from_numpy(row) for row in noise], []
    timesteps = scheduler.timesteps if timesteps is None else timesteps
    if clean is None:
        x = x * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(torch.from_numpy(clean), x, timesteps[:1].repeat(len(x)))
    for i, t in enumerate(timesteps):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, i=i, **__: rows[i], raising=False)
        extra = {} if eta is None else {"eta": eta}
        if eta and isinstance(scheduler, diffusers.DDIMScheduler):
            extra["variance_noise"] = rows[i]
        output = network(torch, scheduler.scale_model_input(x, t), t.to(torch.float32).repeat(len(x)))
        x = scheduler.step(output, t, x, **extra).prev_sample
        if known is not None:
            mask, kept, added = (torch.from_numpy(array) for array in known)
            if i < len(timesteps) - 1:
                kept = scheduler.add_noise(kept, added, torch.tensor([timesteps[i + 1]]))
            x = (1 - mask) * kept + mask * x
        trajectory.append(x.numpy())
    return trajectory


def error(ours, theirs):
    """The largest difference over the largest value."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def inputs(steps):
    """Standard normal latents and per-step noise of a step count."""
    rng = np.random.default_rng(steps)
    return rng.normal(size=SHAPE).astype(np.float32), rng.normal(size=(steps, *SHAPE)).astype(np.float32)
