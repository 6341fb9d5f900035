"""What a network output means: conversions between epsilon, v and x_0, and the way to another noise level.

All in float32: at t = 999 an epsilon prediction is divided by alpha = 0.068, which half precision does not survive.
`alpha` and `sigma` are scalars or arrays with explicit trailing axes, such as (B, 1, 1, 1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hypersd_jax.diffusion.names import require_name
from hypersd_jax.diffusion.schedule import PREDICTION_TYPES


def _f32(value: ArrayLike) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


def to_x0_eps(
    output: ArrayLike, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike, prediction_type: str
) -> tuple[jax.Array, jax.Array]:
    """The clean-latent and noise estimates that a network output at x = alpha x_0 + sigma eps stands for.

    Args:
        output: raw network output (B, h, w, C), any float dtype.
        x: the network's input latents, same shape.
        alpha: scalar or (B, 1, 1, 1); nonzero for "epsilon".
        sigma: scalar or (B, 1, 1, 1); nonzero for "sample".
        prediction_type: "epsilon", "v_prediction" (v = alpha eps - sigma x_0, arXiv 2202.00512) or "sample".

    Returns:
        (x_0, eps), float32.
    """
    require_name("prediction_type", prediction_type, PREDICTION_TYPES)
    output, x, alpha, sigma = _f32(output), _f32(x), _f32(alpha), _f32(sigma)
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction_type == "sample":
        return output, (x - alpha * output) / sigma
    return alpha * x - sigma * output, alpha * output + sigma * x


def from_x0_eps(x0: ArrayLike, eps: ArrayLike, alpha: ArrayLike, sigma: ArrayLike, prediction_type: str) -> jax.Array:
    """The network output, float32, that `to_x0_eps` reads as (x0, eps): the regression target of a denoiser."""
    require_name("prediction_type", prediction_type, PREDICTION_TYPES)
    x0, eps, alpha, sigma = _f32(x0), _f32(eps), _f32(alpha), _f32(sigma)
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    return alpha * eps - sigma * x0


def add_noise(x0: ArrayLike, eps: ArrayLike, alpha_s: ArrayLike, sigma_s: ArrayLike) -> jax.Array:
    """Add noise: alpha_s x_0 + sigma_s eps, float32.

    With a model's estimates this is Psi(x_t, f, s) of Hyper-SD Eq. 1, one deterministic DDIM step to time s; with
    data and fresh noise it is the forward process. From t to t it is the identity: no c_skip, c_out are needed.
    """
    return _f32(alpha_s) * _f32(x0) + _f32(sigma_s) * _f32(eps)
