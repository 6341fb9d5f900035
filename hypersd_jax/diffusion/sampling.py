"""The sampling loop: one scan over a solver's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from hypersd_jax.diffusion.prediction import to_x0_eps
from hypersd_jax.diffusion.solvers import injects_noise
from hypersd_jax.errors import UserError

Predict = Callable[[jax.Array, jax.Array], jax.Array]
Callback = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def sample(
    predict: Predict,
    table: Mapping[str, ArrayLike],
    latents: ArrayLike,
    noise: ArrayLike | None,
    *,
    prediction_type: str,
    callback: Callback | None = None,
) -> jax.Array:
    """Integrates from standard normal latents to clean ones by the rows of a `solver_table`.

    The table's arrays are data, not constants: under `jax.jit` another eta or another timestep list of the same length
    reuses the compiled program.

    Args:
        predict: (x (B, h, w, C) float32, t (B,)) -> raw network output, guidance already applied.
        table: what `solver_table` returns.
        latents: standard normal (B, h, w, C).
        noise: standard normal (n, B, h, w, C), row i for step i; None for a table that injects none.
        prediction_type: "epsilon", "v_prediction" or "sample".
        callback: called on the host as (step, timestep, latents after the step), for progress and previews.

    Returns:
        The last latents, float32 (B, h, w, C), still multiplied by the VAE's scaling factor.

    Raises:
        UserError: noise is missing or has another number of rows than the table.
    """
    rows = {key: jnp.asarray(value) for key, value in table.items() if key != "init_noise_sigma"}
    steps = rows["timesteps"].shape[0]
    if noise is None and not isinstance(table["c_noise"], jax.core.Tracer) and injects_noise(table):
        raise UserError("noise: this sampler injects noise, but none was given")
    start = jnp.asarray(latents, jnp.float32)
    if noise is not None:
        rows["noise"] = jnp.asarray(noise, jnp.float32)
        if rows["noise"].shape != (steps, *start.shape):
            raise UserError(f"noise must have the shape {(steps, *start.shape)}, not {rows['noise'].shape}")
    rows["step"] = jnp.arange(steps, dtype=jnp.int32)

    def body(carry: tuple[jax.Array, jax.Array], row: dict[str, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, x0_prev = carry
        x_in = row["c_in"] * x
        output = predict(x_in, jnp.full(x.shape[:1], row["timesteps"]))
        x0, eps = to_x0_eps(output, x_in, row["alpha"], row["sigma"], prediction_type)
        x0 = jnp.clip(x0, -row["clip"], row["clip"])
        x = row["c_x0"] * x0 + row["c_eps"] * eps + row["c_x"] * x + row["c_x0_prev"] * x0_prev
        if noise is not None:
            x = x + row["c_noise"] * row["noise"]
        if callback is not None:
            jax.debug.callback(callback, row["step"], row["timesteps"], x)
        return (x, x0), None

    start = start * jnp.asarray(table["init_noise_sigma"], jnp.float32)
    (final, _), _ = jax.lax.scan(body, (start, jnp.zeros_like(start)), rows)
    return final
