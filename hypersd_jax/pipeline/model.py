"""Text to image: the object that users hold.

Three programs are compiled, once for each shape: text encoding, the solver's scan over the UNet, and decoding. Prompt,
seed, guidance above 1, eta, timesteps, LoRA and LoRA scale enter them as arrays, so changing one compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hypersd_jax import presets
from hypersd_jax.adapters import Adapter, merge
from hypersd_jax.compilation import compiler_options
from hypersd_jax.conditioning import Conditioning, size_ids, warn_of_cuts
from hypersd_jax.config import nearest
from hypersd_jax.diffusion import Schedule, begin, injects_noise
from hypersd_jax.errors import UserError
from hypersd_jax.paths import expanded
from hypersd_jax.pipeline import arguments, pictures, programs
from hypersd_jax.pipeline.arguments import Callback, parse_dtype, to_pil
from hypersd_jax.pipeline.guides import Controls, PictureGuides
from hypersd_jax.pipeline.lora_stack import LoraStack
from hypersd_jax.pipeline.naming import described, refuse_unknown
from hypersd_jax.pipeline.prompting import make_prompt_encoder
from hypersd_jax.pipeline.settings import resolve_settings, table_for
from hypersd_jax.weights.components import Components, load_components
from hypersd_jax.weights.diffusers.controlnet import LoadedControlNet, load_controlnet
from hypersd_jax.weights.diffusers.vae import load_vae
from hypersd_jax.weights.hub import fetch_lora
from hypersd_jax.weights.lora import LoraReport
from hypersd_jax.weights.placement import batch_sharding


class Pipeline:
    """A Stable Diffusion model with its LoRAs, ready to draw. Make one with `from_pretrained`."""

    def __init__(self, components: Components, *, dtype: Any, mesh: Mesh | None = None) -> None:
        self.components = components
        self.dtype = dtype
        self.mesh = mesh
        self.schedule = Schedule.from_config(dict(components.scheduler_config))
        self.prompts = make_prompt_encoder(components)
        self._params: Mapping[str, Mapping[str, jax.Array]] = components.params
        self._fused: Mapping[str, Mapping[str, jax.Array]] | None = None
        self._controlnets: dict[str, LoadedControlNet] = {}
        self._vae_config = components.vae_config  # the model's own, which a file without a configuration is read by
        self._loras = LoraStack(components.shapes, mesh)
        platform = None if mesh is None else str(mesh.devices.flat[0].platform)
        compiled = functools.partial(jax.jit, compiler_options=compiler_options(dtype, platform))
        self._compiled = compiled
        self._encode = compiled(functools.partial(programs.encode, self.prompts, dtype))
        self._scan = compiled(
            # Without weights: they are arguments, and one that `load_vae` has replaced must not be kept alive.
            functools.partial(programs.scan, dataclasses.replace(components, params={})),
            static_argnames=("controlnets", "prompted_only", "prediction_type"),
        )
        self._compile_vae()
        self._draw_noise = jax.jit(programs.draw_noise, static_argnames="shape")

    def _compile_vae(self) -> None:
        decode = functools.partial(programs.decode, self.components)
        self._decode = self._compiled(decode, static_argnames="tiled")
        encode_image = functools.partial(programs.encode_image, self.components)
        self._encode_image = self._compiled(encode_image, static_argnames="tiled")

    def __repr__(self) -> str:
        return described(self.components, self.dtype, self.mesh, self._loras.loaded(), fused=self._fused is not None)

    @property
    def native_size(self) -> tuple[int, int]:
        """The pictures' height and width in pixels where none are asked for."""
        return self._pixels(self._latent_size(None, None))

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, dtype: Any = None, mesh: Mesh | None = None, **unknown: Any
    ) -> Pipeline:
        """Load a model.

        Args:
            source: a diffusers folder, a single .safetensors file, the hub id of either (``owner/name``), or
                ``embedded`` for the small model inside the package.
            dtype: of parameters and arithmetic; None is bfloat16 on TPU and GPU, float32 on a CPU.
            mesh: devices with axes ``data`` and ``fsdp``; batches are split over both, large parameters over ``fsdp``.

        Raises:
            UserError: one line naming the file or key that is missing, unsupported or damaged.
        """
        refuse_unknown(unknown, cls.from_pretrained)
        resolved = parse_dtype(dtype)
        components = load_components(source, dtype=resolved, mesh=mesh)
        return cls(components, dtype=resolved, mesh=mesh)

    # MARK: LoRA

    def load_lora(self, file: str | Path, scale: float = 1.0, name: str | None = None) -> LoraReport:
        """Add a LoRA file of any supported layout, local or of the hub.

        The same ``name`` replaces; its default is a local file's stem, numbered where another has it, or the hub id.
        Returns what matched. Keys that belong to no module of this model are a `UserError`.
        """
        self._require_unfused("load_lora")
        path = fetch_lora(file)
        # Files of the hub are often called the same.
        return self._loras.load(path, scale, name or (None if expanded(Path(file)).exists() else str(file)))

    def add_lora(
        self, name: str, adapters: Mapping[str, Adapter], scale: float = 1.0, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Add adapters held in memory, by component; the same ``name`` replaces."""
        self._require_unfused("add_lora")
        self._loras.add(name, adapters, scale, metadata)

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Change the scale of a loaded LoRA; compiles nothing."""
        self._require_unfused("set_lora_scale")
        self._loras.set_scale(name, scale)

    def unload_lora(self, name: str | None = None) -> None:
        """Take one LoRA out, or all of them."""
        self._require_unfused("unload_lora")
        self._loras.remove(name)

    def fuse_lora(self) -> None:
        """Write the loaded LoRAs into the weights, which makes every UNet call a little cheaper."""
        self._require_unfused("fuse_lora")
        fused = dict(self._loras.altered(self._params))
        for component, adapter in self._loras.adapters().items():
            fused[component] = merge(fused[component], adapter)
        self._fused = fused

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: the base's weights come back bit for bit, for they were never changed."""
        if self._fused is None:
            raise UserError("unfuse_lora: no LoRA is fused")
        self._fused = None

    def _require_unfused(self, what: str) -> None:
        if self._fused is not None:
            raise UserError(f"{what}: LoRAs are fused into the weights; call unfuse_lora first")

    # MARK: other parts

    def load_vae(self, source: str | Path) -> None:
        """Use another autoencoder, such as a tiny one (TAESD): a diffusers folder, a file, or a hub id.

        Raises:
            UserError: it cannot be read, or does not fit the model's latents.
        """
        found = load_vae(source, vae_config=self._vae_config, dtype=self.dtype, mesh=self.mesh)
        for net in self._controlnets.values():
            net.config.require_fit(self.components.unet_config, found.config.downscale)
        self.components = dataclasses.replace(
            self.components,
            vae=found.network,
            vae_config=found.config,
            params={**self.components.params, "vae": found.params},
        )
        self._params = self.components.params
        if self._fused is not None:
            self._fused = {**self._fused, "vae": found.params}
        self._compile_vae()

    def load_controlnet(self, source: str | Path, name: str | None = None) -> None:
        """Add a ControlNet: a diffusers folder, a file, or a hub id; the same ``name`` (default: the source) replaces.

        From then on every call needs a `control_image` for each.

        Raises:
            UserError: it cannot be read, or does not fit the model.
        """
        found = load_controlnet(
            source,
            unet_config=self.components.unet_config,
            downscale=self.components.vae_config.downscale,
            dtype=self.dtype,
            mesh=self.mesh,
        )
        if (channels := found.config.conditioning_channels) != 3:
            raise UserError(f"{source}: conditioning_channels={channels}, but pictures have 3")
        self._controlnets[name or str(source)] = found

    def unload_controlnet(self, name: str | None = None) -> None:
        """Take one ControlNet out, or all of them."""
        if name is None:
            self._controlnets.clear()
        elif self._controlnets.pop(name, None) is None:
            raise UserError(f"no ControlNet named {name!r} is loaded{nearest(name, self._controlnets)}")

    # MARK: sampling

    def settings(self, preset: str | None = None, **explicit: Any) -> presets.Preset:
        """What a call with these arguments samples with, see `resolve_settings`."""
        return resolve_settings(presets.Preset(**explicit), preset, self._loras.loaded().values(), self.components)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
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
        **unknown: Any,
    ) -> Any:
        """Draw ``num_images`` pictures for each prompt.

        Args:
            prompt: one prompt or several.
            negative_prompt: what to steer away from when ``guidance`` is above 1; None: the model's own unconditional.
            steps, sampler, eta, guidance, spacing, timesteps: None takes the preset's, else those of the last LoRA that
                states any, else the base's many-step default. ``guidance`` 0 or 1 is off: one UNet call a step, as
                it always is for a model that embeds guidance (``time_cond_proj_dim``).
            preset: a name from `hypersd_jax.presets.PRESETS`.
            seed: image j of prompt i depends on (seed, i, j) alone.
            latents: (B, h, w, C) float32 standard normal start, instead of one from the seed.
            noise: (steps, B, h, w, C) float32 standard normal, what a stochastic solver adds.
            height, width: in pixels, multiples of the autoencoder's factor; None is the given picture's size, else the
                model's own.
            output: ``pil``, ``np`` (B, H, W, 3) in 0..1, or ``latent`` (B, h, w, C) before the scaling factor.
            callback: called as ``callback(step, steps)`` after each step, counted over all rounds; the call is
                ``stepwise`` then. What it raises ends the call.
            image: start from this picture, or one for each prompt (`pictures.pictures`), instead of from noise alone.
            strength: the share of the steps that is walked from it, above 0 and at most 1; None is 0.8, with SDXL 0.3,
                as in diffusers, and 1 with a mask. Few steps need a high one: at least one step must be left.
            mask: repaint the image where this is white (`pictures.masks`) and keep the rest. An inpainting model reads
                it; with any other, what is kept is put back after each step.
            control_image: one picture for each loaded ControlNet, in a list where there are several.
            control_scale: how strongly they steer, one number for all or one for each.
            guess_mode: let the ControlNets steer without a prompt, as in diffusers.
            tiled: encode and decode in overlapping tiles of 64 latent pixels, which bounds large pictures' memory.
            long_prompts: ``cut`` reads what the text encoder holds and warns of the rest, as diffusers does; ``chunk``
                reads all of it in windows, as A1111 and ComfyUI do: as many as the prompt or its negative fills.
            batch_size: pictures drawn at a time; None is all at once. It changes memory and speed, not the pictures.
            stepwise: run one compiled step at a time instead of the whole scan, so that another step count compiles
                nothing; the pictures are the same.

        Raises:
            UserError: an argument is out of range or has another name here than in diffusers; the line names it.
            TypeError: an argument that nobody knows.
        """
        refuse_unknown(unknown, self.__call__)
        if output not in ("pil", "np", "latent"):
            raise UserError(f"output={output!r} is not valid{nearest(output, ('pil', 'np', 'latent'))}")
        if long_prompts not in ("cut", "chunk"):
            raise UserError(f"long_prompts={long_prompts!r} is not valid{nearest(long_prompts, ('cut', 'chunk'))}")
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if timesteps is not None:
            timesteps = tuple(arguments.listed(timesteps))
            steps = len(timesteps) if steps is None else steps
        plan = self.settings(
            preset,
            steps=steps,
            sampler=sampler,
            eta=eta,
            guidance=guidance,
            spacing=spacing,
            timesteps=timesteps,
        )
        strength = arguments.share(strength, image, mask, default=0.3 if self.components.is_xl else 0.8)
        table = table_for(plan, self.components, strength)
        prompts = arguments.texts("prompt", prompt, str)
        negatives = arguments.texts("negative_prompt", negative_prompt, str, type(None))
        if len(negatives) not in (1, len(prompts)):
            raise UserError(f"negative_prompt: {len(negatives)} given for {len(prompts)} prompts")
        scale = float(arguments.checked("guidance", plan.guidance or 0.0, ()))
        if scale < 0:
            raise UserError(f"guidance={scale:g} is negative")
        guidance_on = scale > 1.0 and not self.components.unet_config.time_cond_proj_dim
        if any(negatives) and not guidance_on:
            warnings.warn(f"negative_prompt is ignored: guidance={scale:g} does not call for it", stacklevel=2)
        negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
        read = [[one, other or ""] if guidance_on else [one] for one, other in zip(prompts, negatives, strict=True)]
        if long_prompts == "cut":
            warn_of_cuts(self.prompts.cuts(prompts))
            warn_of_cuts(self.prompts.cuts([text for _, *others in read for text in others]), "negative prompt")
        windows = [self.prompts.windows(texts) if long_prompts == "chunk" else None for texts in read]
        given = ("image", image) if image is not None else ("control_image", control_image)
        if None in (height, width) and given[1] is not None:
            own = pictures.picture_size(*given, self.components.vae_config.downscale)
            height, width = own[0] if height is None else height, own[1] if width is None else width
        size = self._latent_size(height, width)
        shape = (len(prompts) * num_images, *size, self.components.unet_config.out_channels)
        rows = np.arange(shape[0])
        first, added = self._noise(seed, rows // num_images, rows % num_images, shape[1:], table)
        if latents is not None:
            first = arguments.checked("latents", latents, shape)
        if noise is not None:
            added = arguments.checked("noise", noise, (len(table["alpha"]), *shape))

        guides = PictureGuides.of(
            image,
            mask,
            len(prompts),
            self._pixels(size),
            factor=self.components.vae_config.downscale,
            inpainting=self.components.is_inpainting,
            encode=functools.partial(self._latents_of, tiled=tiled),
        )
        nets = list(self._controlnets.values())
        controls = Controls.of(nets, control_image, control_scale, guess_mode, len(prompts), self._pixels(size))
        keep_noise = mask is not None and strength == 1
        parts = []
        rounds = arguments.rounds([number for number in windows for _ in range(num_images)], batch_size)
        progress = None if callback is None else arguments.Progress(callback, len(rounds) * len(added))
        stepwise = stepwise or progress is not None
        for each in rounds:
            owners = each.rows // num_images
            cond = self._condition([prompts[owner] for owner in owners], size, each.windows)
            uncond = None
            if guidance_on:
                uncond = self._unconditional([negatives[owner] for owner in owners], size, cond, each.windows)
            drawn = guides.rows(owners)
            start, steps_noise = self._place(first[each.rows]), self._place(added[:, each.rows], axis=1)
            state = begin(table, start, None if keep_noise else drawn.clean)
            for part, rows_noise in arguments.slices(table, steps_noise) if stepwise else [(table, steps_noise)]:
                state = self._scan(
                    self._weights()["unet"],
                    self._active_adapters().get("unet", {}),
                    cond,
                    uncond,
                    np.float32(scale),
                    part,
                    state,
                    rows_noise,
                    drawn.steering(start, controls.images(owners)),
                    controls.params,
                    controls.scales,
                    controlnets=controls.networks,
                    prompted_only=controls.prompted_only and guidance_on,
                    prediction_type=plan.prediction_type or self.schedule.prediction_type,
                )
                if progress is not None:
                    progress.follow(state.x)
            found = state.x
            if output != "latent":
                found = self._decode(self._weights()["vae"], state.x, tiled=tiled)
            if progress is not None:
                progress.finish()
            parts.append(np.asarray(found))
        images = arguments.joined(rounds, parts)
        arguments.warn_if_not_finite(images, self.dtype)
        return to_pil(images) if output == "pil" else images

    def _latents_of(self, batch: np.ndarray, *, tiled: bool = False) -> np.ndarray:
        """Latents (N, h, w, C) of pictures (N, H, W, 3), one at a time."""
        vae = self._weights()["vae"]
        rows = (batch[i : i + 1] for i in range(len(batch)))
        return np.concatenate([np.asarray(self._encode_image(vae, row, tiled=tiled)) for row in rows])

    def _pixels(self, size: tuple[int, int]) -> tuple[int, int]:
        factor = self.components.vae_config.downscale
        return size[0] * factor, size[1] * factor

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        native = self.components.unet_config.sample_size
        return arguments.latent_size(height, width, native, self.components.vae_config.downscale)

    def _noise(
        self, seed: int, prompts: np.ndarray, images: np.ndarray, shape: tuple[int, int, int], table: Mapping[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Start (B, h, w, C) and what each step adds (steps, B, h, w, C); zeros where the solver adds none."""
        draw = functools.partial(self._draw_noise, np.uint32(seed % 2**32), prompts, images, shape=shape)
        start = np.asarray(draw(np.uint32(0)))
        steps = len(table["alpha"])
        if not injects_noise(table):
            return start, np.zeros((steps, *start.shape), np.float32)
        return start, np.stack([np.asarray(draw(np.uint32(i))) for i in range(1, steps + 1)])

    def _place(self, value: Any, axis: int = 0) -> Any:
        if self.mesh is None or value.shape[axis] % self.mesh.size:
            return value
        return jax.device_put(value, batch_sharding(self.mesh, axis))

    def _active_adapters(self) -> Mapping[str, Adapter]:
        """The joined LoRAs by component; none while they are fused into the weights."""
        return {} if self._fused is not None else self._loras.adapters()

    def _weights(self) -> Mapping[str, Mapping[str, jax.Array]]:
        """The parameters to draw with: the base's, with what is fused or differs beside the LoRAs' factors."""
        return self._loras.altered(self._params) if self._fused is None else self._fused

    def _condition(self, prompts: Sequence[str], size: tuple[int, int], windows: int | None = None) -> Conditioning:
        weights = self._weights()
        text_params = {name: weights[name] for name in self.components.text_encoders}
        adapters = {name: a for name, a in self._active_adapters().items() if name in text_params}
        ids = self.prompts.tokenize(prompts, windows=windows, on_cut=lambda _: None)  # `__call__` has warned
        cond: Conditioning = self._encode(text_params, ids, adapters)
        if not self.components.is_xl:
            return cond
        return cond._replace(time_ids=jnp.asarray(size_ids(*self._pixels(size), len(prompts))))

    def _unconditional(
        self, texts: list[str | None], size: tuple[int, int], cond: Conditioning, windows: int | None = None
    ) -> Conditioning:
        """Of the negative prompts; None stands for the model's own unconditional, zeros or that of an empty prompt."""
        zeros = np.asarray([self.components.zero_unconditional and text is None for text in texts])
        uncond = cond if zeros.all() else self._condition([text or "" for text in texts], size, windows)
        if not zeros.any():
            return uncond
        pooled = None if uncond.pooled is None else jnp.where(zeros[:, None], 0, uncond.pooled)
        return uncond._replace(context=jnp.where(zeros[:, None, None], 0, uncond.context), pooled=pooled)
