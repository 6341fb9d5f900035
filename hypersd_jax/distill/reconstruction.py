"""The autoencoder's loss: the difference between an image and its reconstruction."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reconstruction_loss(
    output: jax.Array,
    images: jax.Array,
    mean: jax.Array,
    logvar: jax.Array,
    *,
    gradient_weight: float,
    kl_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute L1 of pixels, L1 of differences between neighbours, and the latents' divergence from N(0, I).

    Args:
        output: decoded images (B, H, W, 3).
        images: the originals (B, H, W, 3) in -1..1.
        mean: of the posterior (B, h, w, C).
        logvar: its log variance, same shape.
        gradient_weight: of the neighbours' term, horizontal plus vertical.
        kl_weight: of 1/2 (mean^2 + var - 1 - log var), averaged over the latents' numbers (Kingma and Welling, arXiv
            1312.6114, appendix B).

    Returns:
        (loss, metrics): float32 scalar, and scalars "l1", "gradient", "kl" and "psnr" (dB, of the clipped output, the
        mean over images).
    """
    output, images = output.astype(jnp.float32), images.astype(jnp.float32)
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    error = output - images
    l1 = jnp.mean(jnp.abs(error))
    gradient = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    loss = l1 + gradient_weight * gradient + kl_weight * kl
    metrics = {"l1": l1, "gradient": gradient, "kl": kl, "psnr": jnp.mean(psnr(output, images))}
    return loss, jax.lax.stop_gradient(metrics)


def psnr(output: jax.Array, images: jax.Array) -> jax.Array:
    """Compute the peak signal-to-noise ratio (B,) in dB of images (B, H, W, 3) in -1..1, of ``output`` clipped."""
    square = jnp.mean(jnp.square((jnp.clip(output, -1.0, 1.0) - images) / 2.0), axis=(1, 2, 3))
    return -10.0 * jnp.log10(jnp.maximum(square, 1e-10))
