"""The sampling loop: one scan over a solver's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from hypersd_jax.diffusion.prediction import to_x0_eps
from hypersd_jax.diffusion.solvers import injects_noise
from hypersd_jax.errors import UserError

Predict = Callable[[jax.Array, jax.Array], jax.Array]


class State(NamedTuple):
    """State between two steps: latents ``x`` and the last estimate ``x0`` of clean ones, (B, h, w, C)."""

    x: jax.Array
    x0: jax.Array


class Known(NamedTuple):
    """The part of an image that inpainting keeps.

    Attributes:
        mask: (B, h, w, 1) or (B, h, w, C): 1 where the sampler paints, 0 where the image stays.
        clean: the image's latents (B, h, w, C), multiplied by the VAE's scaling factor.
        noise: standard normal (B, h, w, C), the same at every step; diffusers takes the start's.
    """

    mask: jax.Array
    clean: jax.Array
    noise: jax.Array


def begin(table: Mapping[str, ArrayLike], latents: ArrayLike, clean: ArrayLike | None = None) -> State:
    """Make the state before a table's first step: noise alone, or clean latents (B, h, w, C) noised to its level.

    `latents` are standard normal (B, h, w, C); a later part of a table continues from the state of `advance`.
    """
    noise = jnp.asarray(latents, jnp.float32)
    if clean is None:
        x = noise * jnp.asarray(table["init_noise_sigma"], jnp.float32)
    else:
        scales = jnp.asarray(table["start_x0"], jnp.float32), jnp.asarray(table["start_noise"], jnp.float32)
        x = scales[0] * jnp.asarray(clean, jnp.float32) + scales[1] * noise
    return State(x=x, x0=jnp.zeros_like(x))


def advance(
    predict: Predict,
    table: Mapping[str, ArrayLike],
    state: State,
    noise: ArrayLike | None,
    *,
    prediction_type: str,
    known: Known | None = None,
) -> State:
    """Take the steps of a table, all of them or a slice of one or more; arguments as those of `sample`."""
    coefficients = {key: jnp.asarray(value) for key, value in table.items() if np.ndim(value) == 1}
    steps = coefficients["timesteps"].shape[0]
    if noise is None and not isinstance(table["c_noise"], jax.core.Tracer) and injects_noise(table):
        raise UserError("noise: this sampler injects noise, but none was given")
    if noise is not None:
        coefficients["noise"] = jnp.asarray(noise, jnp.float32)
        if coefficients["noise"].shape != (steps, *state.x.shape):
            raise UserError(f"noise must have the shape {(steps, *state.x.shape)}, not {coefficients['noise'].shape}")
    kept = None if known is None else jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), known)

    def body(state: State, step: dict[str, jax.Array]) -> tuple[State, None]:
        x = state.x
        x_in = step["c_in"] * x
        output = predict(x_in, jnp.full(x.shape[:1], step["timesteps"]))
        x0, eps = to_x0_eps(output, x_in, step["alpha"], step["sigma"], prediction_type)
        x0 = jnp.clip(x0, -step["clip"], step["clip"])
        x = step["c_x0"] * x0 + step["c_eps"] * eps + step["c_x"] * x + step["c_x0_prev"] * state.x0
        if noise is not None:
            x = x + step["c_noise"] * step["noise"]
        if kept is not None:
            noised = step["known_x0"] * kept.clean + step["known_noise"] * kept.noise
            x = (1 - kept.mask) * noised + kept.mask * x
        return State(x=x, x0=x0), None

    final, _ = jax.lax.scan(body, state, coefficients)
    return final


def sample(
    predict: Predict,
    table: Mapping[str, ArrayLike],
    latents: ArrayLike,
    noise: ArrayLike | None,
    *,
    prediction_type: str,
    clean: ArrayLike | None = None,
    known: Known | None = None,
) -> jax.Array:
    """Integrate from standard normal latents to clean ones by the update coefficients of a `solver_table`.

    The table's arrays are data, not constants: under `jax.jit` another eta or another timestep list of the same length
    reuses the compiled program.

    Args:
        predict: (x (B, h, w, C) float32, t (B,)) -> raw network output, guidance already applied.
        table: what `solver_table` returns.
        latents: standard normal (B, h, w, C).
        noise: standard normal (n, B, h, w, C), entry i for step i; None for a table that injects none.
        prediction_type: "epsilon", "v_prediction" or "sample".
        clean: latents (B, h, w, C) of an image to start from, noised by `latents` to the level of the first step; None
            starts from noise alone.
        known: what inpainting puts back after each step, noised to that step's level.

    Returns:
        The last latents, float32 (B, h, w, C), still multiplied by the VAE's scaling factor.

    Raises:
        UserError: noise is missing or has another number of steps than the table.
    """
    state = begin(table, latents, clean)
    return advance(predict, table, state, noise, prediction_type=prediction_type, known=known).x
