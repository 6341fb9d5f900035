"""Text to image: the object that users hold.

Three programs are compiled, once for each shape: text encoding, the solver's scan over the UNet, and decoding. Prompt,
seed, guidance above 1, eta, timesteps, LoRA and LoRA scale enter them as arrays, so changing one compiles nothing.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hypersd_jax import presets
from hypersd_jax.adapters import Adapter
from hypersd_jax.adapters import fuse as fuse_adapter
from hypersd_jax.adapters import unfuse as unfuse_adapter
from hypersd_jax.conditioning import Conditioning, size_ids
from hypersd_jax.config import nearest
from hypersd_jax.diffusion import Schedule, begin, solver_table
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import arguments, programs
from hypersd_jax.pipeline.arguments import Callback, parse_dtype, to_pil
from hypersd_jax.pipeline.prompting import make_prompt_encoder
from hypersd_jax.weights.components import Components, load_components
from hypersd_jax.weights.lora import LoraReport
from hypersd_jax.weights.lora_stack import LoraStack
from hypersd_jax.weights.placement import batch_sharding


class Pipeline:
    """A Stable Diffusion model with its LoRAs, ready to draw. Make one with `from_pretrained`."""

    def __init__(self, components: Components, *, dtype: Any, mesh: Mesh | None = None) -> None:
        self.components = components
        self.dtype = dtype
        self.mesh = mesh
        self.schedule = Schedule.from_config(dict(components.scheduler_config))
        self.prompts = make_prompt_encoder(components)
        self._params: dict[str, dict[str, jax.Array]] = {k: dict(v) for k, v in components.params.items()}
        self._backup: dict[str, dict[str, jax.Array]] | None = None
        self._loras = LoraStack(components.shapes, mesh)
        self._encode = jax.jit(functools.partial(programs.encode, self.prompts, dtype))
        self._scan = jax.jit(
            functools.partial(programs.scan, components), static_argnames=("prediction_type", "on_step")
        )
        self._callback: Callable[[], None] | None = None
        self._step = self._on_step  # one object, so that jit sees one static argument
        self._decode = jax.jit(functools.partial(programs.decode, components))
        self._draw_noise = jax.jit(programs.draw_noise, static_argnames=("shape", "steps"))

    @property
    def native_size(self) -> tuple[int, int]:
        """The pictures' height and width in pixels where none are asked for."""
        h, w = self._latent_size(None, None)
        return h * self.components.vae_config.downscale, w * self.components.vae_config.downscale

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: Any = None, mesh: Mesh | None = None) -> Pipeline:
        """Load a diffusers model folder, or ``embedded`` for the small model inside the package.

        Args:
            source: the folder.
            dtype: of parameters and arithmetic; None is bfloat16 on TPU and GPU, float32 on a CPU.
            mesh: devices with axes ``data`` and ``fsdp``; batches are split over both, large parameters over ``fsdp``.

        Raises:
            UserError: one line naming the file or key that is missing, unsupported or damaged.
        """
        resolved = parse_dtype(dtype)
        components = load_components(source, dtype=resolved, mesh=mesh)
        return cls(components, dtype=resolved, mesh=mesh)

    # MARK: LoRA

    def load_lora(self, file: str | Path, scale: float = 1.0, name: str | None = None) -> LoraReport:
        """Add a LoRA file of any supported layout; the same ``name`` (default: the file's stem) replaces.

        Returns what matched. Keys that belong to no module of this model are a `UserError`.
        """
        self._require_unfused("load_lora")
        return self._loras.load(Path(file), scale, name)

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
        self._backup = {}
        for component, adapter in self._loras.adapters().items():
            self._params[component], self._backup[component] = fuse_adapter(self._params[component], adapter)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: the base's weights come back bit for bit."""
        if self._backup is None:
            raise UserError("unfuse_lora: no LoRA is fused")
        for component, backup in self._backup.items():
            self._params[component] = unfuse_adapter(self._params[component], backup)
        self._backup = None

    def _require_unfused(self, what: str) -> None:
        if self._backup is not None:
            raise UserError(f"{what}: LoRAs are fused into the weights; call unfuse_lora first")

    # MARK: sampling

    def settings(self, preset: str | None = None, **explicit: Any) -> presets.Preset:
        """What a call with these arguments samples with: explicit, else preset, else LoRA header, else the base's."""
        chain = [presets.Preset(**explicit)]
        if preset is not None:
            chain.append(presets.find(preset))
        last = self._loras.last()
        if last is not None:
            chain += [presets.from_header(last.metadata, last.origin), presets.preset_for_file(last.origin)]
        chain.append(presets.BASE_SDXL if self.components.is_xl else presets.BASE_SD)
        return presets.resolve(chain)

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
        long_prompts: str = "cut",
        batch_size: int | None = None,
        stepwise: bool = False,
    ) -> Any:
        """Draw ``num_images`` pictures for each prompt.

        Args:
            prompt: one prompt or several.
            negative_prompt: what to steer away from when ``guidance`` is above 1; None: the model's own unconditional.
            steps, sampler, eta, guidance, spacing, timesteps: None takes the preset's, else the last LoRA's header's,
                else the base's many-step default. ``guidance`` 0 or 1 is off: one UNet call a step, as
                it always is for a model that embeds guidance (``time_cond_proj_dim``).
            preset: a name from `hypersd_jax.presets.PRESETS`.
            seed: image j of prompt i depends on (seed, i, j) alone.
            latents: (B, h, w, C) float32 standard normal start, instead of one from the seed.
            noise: (steps, B, h, w, C) float32 standard normal, what a stochastic solver adds.
            height, width: in pixels, multiples of the autoencoder's factor; None is the model's own size.
            output: ``pil``, ``np`` (B, H, W, 3) in 0..1, or ``latent`` (B, h, w, C) before the scaling factor.
            callback: called as ``callback(step, steps)`` after each step, counted over all rounds.
            long_prompts: ``cut`` reads what the text encoder holds and warns of the rest, as diffusers does; ``chunk``
                reads all of it in windows, as A1111 and ComfyUI do: every prompt of the call with equally many.
            batch_size: pictures drawn at a time; None is all at once. It changes memory and speed, not the pictures.
            stepwise: run one compiled step at a time instead of the whole scan, so that another step count compiles
                nothing; the pictures are the same.

        Raises:
            UserError: an argument is out of range; the line names it.
        """
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
        table = self._table(plan)
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
        windows = None
        if long_prompts == "chunk":  # one count for all rounds and for both halves of a guided step
            windows = self.prompts.windows([*prompts, *(text or "" for text in negatives)])
        size = self._latent_size(height, width)
        shape = (len(prompts) * num_images, *size, self.components.unet_config.out_channels)
        rows = np.arange(shape[0])
        first, added = self._draw_noise(
            np.uint32(seed % 2**32), rows // num_images, rows % num_images, shape=shape[1:], steps=len(table["alpha"])
        )
        if latents is not None:
            first = arguments.checked("latents", latents, shape)
        if noise is not None:
            added = arguments.checked("noise", noise, (len(table["alpha"]), *shape))

        parts = []
        rounds = arguments.rounds(rows, batch_size or len(rows))
        self._callback = None if callback is None else arguments.counter(callback, len(rounds) * len(added))
        for picked in rounds:
            cond = self._condition([prompts[row // num_images] for row in picked], size, windows)
            uncond = None
            if guidance_on:
                uncond = self._unconditional(
                    [negatives[row // num_images % len(negatives)] for row in picked], size, cond, windows
                )
            state, steps_noise = begin(table, self._place(first[picked])), self._place(added[:, picked], axis=1)
            for part, rows_noise in arguments.slices(table, steps_noise) if stepwise else [(table, steps_noise)]:
                state = self._scan(
                    self._params["unet"],
                    self._active_adapters().get("unet", {}),
                    cond,
                    uncond,
                    np.float32(scale),
                    part,
                    state,
                    rows_noise,
                    prediction_type=plan.prediction_type or self.schedule.prediction_type,
                    on_step=None if callback is None else self._step,
                )
            parts.append(np.asarray(state.x if output == "latent" else self._decode(self._params["vae"], state.x)))
        jax.effects_barrier()
        images = np.concatenate(parts)[: len(rows)]
        return to_pil(images) if output == "pil" else images

    def _on_step(self, _step: Any, _timestep: Any, _latents: Any) -> None:
        if self._callback is not None:
            self._callback()

    def _table(self, plan: presets.Preset) -> dict[str, np.ndarray]:
        config = dict(self.components.scheduler_config)
        if plan.original_inference_steps is not None:
            config["original_inference_steps"] = plan.original_inference_steps
        if plan.prediction_type is not None:
            config["prediction_type"] = plan.prediction_type
        return solver_table(
            str(plan.sampler),
            plan.steps,
            eta=float(plan.eta or 0.0),
            spacing=plan.spacing,
            scheduler_config=config,
            timesteps=plan.timesteps,
        )

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        factor = self.components.vae_config.downscale
        size = self.components.unet_config.sample_size
        default = size if isinstance(size, tuple) else (size, size)
        sizes = []
        for name, value, native in (("height", height, default[0]), ("width", width, default[1])):
            if value is None and not native:
                raise UserError(f"{name} must be given: the model's unet/config.json has no sample_size")
            pixels = native * factor if value is None else value
            if pixels < factor or pixels % factor:
                raise UserError(f"{name}={pixels} must be a positive multiple of {factor}")
            sizes.append(pixels // factor)
        return sizes[0], sizes[1]

    def _place(self, value: Any, axis: int = 0) -> Any:
        if self.mesh is None or value.shape[axis] % self.mesh.size:
            return value
        return jax.device_put(value, batch_sharding(self.mesh, axis))

    def _active_adapters(self) -> Mapping[str, Adapter]:
        """The joined LoRAs by component; none while they are fused into the weights."""
        return {} if self._backup is not None else self._loras.adapters()

    def _condition(self, prompts: Sequence[str], size: tuple[int, int], windows: int | None = None) -> Conditioning:
        text_params = {name: self._params[name] for name in self.components.text_encoders}
        adapters = {name: a for name, a in self._active_adapters().items() if name in text_params}
        cond: Conditioning = self._encode(text_params, self.prompts.tokenize(prompts, windows=windows), adapters)
        if not self.components.is_xl:
            return cond
        factor = self.components.vae_config.downscale
        return cond._replace(time_ids=jnp.asarray(size_ids(size[0] * factor, size[1] * factor, len(prompts))))

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
