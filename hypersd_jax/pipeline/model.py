"""Text to image: the object that users hold.

A call is resolved (`settings`), planned (`plan`) and run (`run`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import arguments, image_inputs
from hypersd_jax.pipeline.arguments import to_pil
from hypersd_jax.pipeline.loaded import LoadedModel
from hypersd_jax.pipeline.naming import refuse_unknown
from hypersd_jax.pipeline.plan import make_plan, read_texts
from hypersd_jax.pipeline.run import Callback, run
from hypersd_jax.pipeline.settings import CallSettings, Settings, resolve_call, resolve_settings
from hypersd_jax.pipeline.steering import Steering, StepRange
from hypersd_jax.presets import Preset

OUTPUTS = ("pil", "np", "latent")


class Generated(NamedTuple):
    """Images of a call, as its ``output`` says, with the resolved settings that they were sampled with."""

    images: Any
    settings: CallSettings


class Pipeline(LoadedModel):
    """A Stable Diffusion model with its LoRAs, ready to sample. Make one with `from_pretrained`."""

    # MARK: sampling

    def settings(self, preset: str | None = None, **explicit: Any) -> Settings:
        """Resolve how a call with these arguments samples: steps, sampler, eta, guidance, spacing, timesteps.

        Raises:
            UserError: a name is not known, or a number is out of range.
        """
        if explicit.get("timesteps") is not None:
            explicit["timesteps"] = tuple(arguments.listed(explicit["timesteps"]))
        return resolve_settings(Preset(**explicit), preset, self._loras.loaded().values(), self.base)

    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = None,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        guidance: float | None = None,
        preset: str | None = None,
        spacing: str | None = None,
        seed: int = 0,
        num_images: int = 1,
        latents: Any = None,
        noise: Any = None,
        timesteps: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        output: str = "pil",
        callback: Callback | None = None,
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
        control_image: Any = None,
        control_scale: float | Sequence[float] = 1.0,
        guess_mode: bool = False,
        tiled: bool = False,
        long_prompts: str = "cut",
        batch_size: int | None = None,
        stepwise: bool = False,
        nag_scale: float = 0.0,
        nag_tau: float = 2.5,
        nag_alpha: float = 0.25,
        guidance_steps: StepRange | None = None,
        base_steps: StepRange | None = None,
        **unknown: Any,
    ) -> Generated:
        """Generate ``num_images`` images for each prompt.

        Args:
            prompt: one prompt or several.
            negative_prompt: what to steer away from when ``guidance`` or ``nag_scale`` is above 1; None: the model's
                own unconditional, and "" for ``nag_scale``.
            steps, sampler, eta, guidance, spacing, timesteps: None takes the preset's, else those of the last LoRA that
                states any, else the base's many-step default. ``guidance`` 0 or 1 is off: one UNet call a step, as
                it always is for a model that embeds guidance (``time_cond_proj_dim``).
            preset: a name from `hypersd_jax.presets.PRESETS`.
            seed: image j of prompt i depends on (seed, i, j) alone.
            latents: (B, h, w, C) float32 standard normal start, instead of one from the seed.
            noise: (steps, B, h, w, C) float32 standard normal, what a stochastic solver adds.
            height, width: in pixels, multiples of the autoencoder's factor; None is the given image's size, else the
                model's own.
            output: ``pil``, ``np`` (B, H, W, 3) in 0..1, or ``latent`` (B, h, w, C) before the scaling factor.
            callback: called as ``callback(step, steps)`` after each step, counted over all rounds; the call is
                ``stepwise`` then. What it raises ends the call.
            image: start from this image, or one for each prompt (`image_inputs.read_images`), not from noise alone.
            strength: the share of the steps that is walked from it, above 0 and at most 1; None is 0.8, with SDXL 0.3,
                as in diffusers, and 1 with a mask. Few steps need a high one: at least one step must be left.
            mask: repaint the image where this is white (`image_inputs.read_masks`) and keep the rest. An inpainting
                model reads it; with any other, what is kept is put back after each step.
            control_image: one image for each loaded ControlNet, in a list where there are several.
            control_scale: how strongly they steer, one number for all or one for each.
            guess_mode: let the ControlNets steer without a prompt, as in diffusers.
            tiled: encode and decode in overlapping tiles of 64 latent pixels, which bounds large images' memory.
            long_prompts: ``cut`` reads what the text encoder holds and warns of the rest, as diffusers does; ``chunk``
                reads all of it in windows, as A1111 and ComfyUI do: as many as the prompt or its negative fills.
            batch_size: images sampled at a time; None is all at once. It changes memory and speed, not the images. On a
                mesh it is rounded up to a multiple of the devices.
            stepwise: run one compiled step at a time instead of the whole scan, so that another step count compiles
                nothing; the images are the same.
            nag_scale: steer each attention to the prompt away from the negative prompt (NAG, arXiv 2505.21179), which
                needs no guidance and no second UNet call; 5 is usual, 0 and 1 are off. Under ``guidance`` above 1 the
                prompted half is steered. ControlNets are not.
            nag_tau: how far it may go, in norms of the prompt's own features.
            nag_alpha: how much of it is taken, 0 to 1.
            guidance_steps: first and last of the steps that ``guidance`` is for, counted from 1: (1, 1) is the first
                alone, (2, None) all but the first. None: all.
            base_steps: those that the base takes without the LoRAs; their first steps decide the composition. None:
                none.

        Raises:
            UserError: an argument is out of range or has another name here than in diffusers; the line names it.
            TypeError: an argument that nobody knows.
        """
        refuse_unknown(unknown, self.generate)
        if output not in OUTPUTS:
            raise UserError(f"output={output!r} is not valid{nearest(output, OUTPUTS)}")
        model = self.active()
        settings = resolve_call(
            self.settings(
                preset,
                steps=steps,
                sampler=sampler,
                eta=eta,
                guidance=guidance,
                spacing=spacing,
                timesteps=timesteps,
            ),
            self.base,
            model.controlnets,
            seed=seed,
            num_images=num_images,
            height=height,
            width=width,
            image=image,
            strength=strength,
            mask=mask,
            control_image=control_image,
            control_scale=control_scale,
            guess_mode=guess_mode,
            long_prompts=long_prompts,
            tiled=tiled,
            steering=Steering(
                nag_scale=nag_scale,
                nag_tau=nag_tau,
                nag_alpha=nag_alpha,
                guidance_steps=guidance_steps,
                base_steps=base_steps,
            ),
        )
        plan = make_plan(
            settings,
            model,
            prompt=prompt,
            negative_prompt=negative_prompt,
            latents=latents,
            noise=noise,
            image=image,
            mask=mask,
            control_image=control_image,
            batch_size=batch_size,
        )
        images = run(plan, model, decode=output != "latent", stepwise=stepwise, callback=callback)
        arguments.warn_if_not_finite(images, self.dtype)
        return Generated(to_pil(images) if output == "pil" else images, settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate images: those of `generate`, which says what the arguments are, without their settings."""
        return self.generate(*args, **kwargs).images

    __call__.__signature__ = inspect.signature(generate)  # type: ignore[attr-defined]  # for `help` and notebooks

    # MARK: single parts of a call

    @overload
    def encode_prompts(
        self, prompts: str | Sequence[str], *, height: int | None = None, width: int | None = None
    ) -> Conditioning: ...

    @overload
    def encode_prompts(
        self,
        prompts: str | Sequence[str],
        negative: str | Sequence[str | None],
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> tuple[Conditioning, Conditioning]: ...

    def encode_prompts(
        self,
        prompts: str | Sequence[str],
        negative: str | Sequence[str | None] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> Conditioning | tuple[Conditioning, Conditioning]:
        """Encode prompts, with the loaded LoRAs, to what the denoiser is conditioned on.

        Args:
            prompts: one or B of them; what the text encoder does not hold is cut, with a warning.
            negative: negative prompts, one for all or one for each; None in a list is the model's own unconditional.
            height, width: of the images, in pixels, which SDXL is conditioned on; None is the model's own size.

        Returns:
            `Conditioning` of batch size B; where ``negative`` is given, that and the unconditional.
        """
        model, size = self.active(), self._size(height, width)
        texts, negatives = read_texts(prompts, negative)
        cond = model.condition(self.base.prompts.tokenize(texts), size)
        if negative is None:
            return cond
        return cond, model.unconditional(model.tokenize_negatives(negatives), cond, size)

    def predict(
        self,
        x: Any,
        t: Any,
        conditioning: Conditioning,
        unconditional: Conditioning | None = None,
        *,
        guidance: float = 1.0,
    ) -> jax.Array:
        """Evaluate the denoiser once, with the loaded LoRAs: what each step of a call does.

        Args:
            x: noisy latents (B, h, w, C), as the solver scales them for the denoiser.
            t: timestep, one or (B,).
            conditioning: of B prompts, see `encode_prompts`.
            unconditional: of B negative prompts, for classifier-free guidance.
            guidance: guidance scale; without ``unconditional`` read only by a denoiser that embeds it.

        Returns:
            (B, h, w, C): noise, v or x_0, as ``pipe.schedule.prediction_type`` says.

        Raises:
            UserError: shapes that do not fit each other or the model, or guidance without its unconditional.
        """
        channels, shape = self.base.denoiser_channels, np.shape(x)
        if len(shape) != 4 or shape[-1] != channels:
            raise UserError(f"x has shape {shape}, not (B, h, w, {channels})")
        for name, given in (("conditioning", conditioning), ("unconditional", unconditional)):
            if given is not None and len(given.context) != shape[0]:
                raise UserError(f"{name} is of {len(given.context)} prompts, but x has batch size {shape[0]}")
        if np.shape(t) not in ((), shape[:1]):
            raise UserError(f"t has shape {np.shape(t)}, not () or {shape[:1]}")
        if guidance > 1 and unconditional is None and not self.base.embeds_guidance:
            raise UserError(f"guidance={guidance:g} needs an unconditional, see encode_prompts")
        model = self.active()
        t = jnp.broadcast_to(jnp.asarray(t), shape[:1])
        return model.predict(jnp.asarray(x), t, conditioning, unconditional, np.float32(guidance))

    def encode_images(self, images: Any, *, tiled: bool = False) -> np.ndarray:
        """Encode images to latents (N, h, w, C), multiplied by the scaling factor, as a call does with ``image``.

        Args:
            images: one or several (`image_inputs.read_images`), resized to the first one's size, rounded down.
            tiled: encode in overlapping tiles.
        """
        size = image_inputs.image_size("images", images, self.base.downscale)
        size = self._size(*size)
        return self.active().encode_images(image_inputs.read_images("images", images, size), tiled=tiled)

    def decode(self, latents: Any, *, tiled: bool = False) -> np.ndarray:
        """Decode latents (B, h, w, C), multiplied by the scaling factor, to images (B, H, W, 3) in 0..1.

        They are those of ``output="latent"`` and of `encode_images`; all are decoded at once.
        """
        channels, shape = self.base.latent_channels, np.shape(latents)
        if len(shape) != 4 or shape[-1] != channels:
            raise UserError(f"latents have shape {shape}, not (B, h, w, {channels})")
        return np.asarray(self.active().decode(jnp.asarray(latents, jnp.float32), tiled=tiled))
