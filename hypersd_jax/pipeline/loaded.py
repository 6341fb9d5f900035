"""The loaded parts of a pipeline: a base with named LoRAs, ControlNets, and perhaps another autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
from jax.sharding import Mesh

from hypersd_jax.adapters import Adapter, merge
from hypersd_jax.bases import TextToImage, load_base
from hypersd_jax.config import nearest
from hypersd_jax.diffusion import Schedule
from hypersd_jax.errors import UserError
from hypersd_jax.paths import expanded
from hypersd_jax.pipeline import arguments
from hypersd_jax.pipeline.active import ActiveModel
from hypersd_jax.pipeline.arguments import free_memory, parse_dtype
from hypersd_jax.pipeline.lora_stack import LoraStack, Params
from hypersd_jax.pipeline.naming import described, refuse_unknown
from hypersd_jax.pipeline.programs import compile_programs, with_autoencoder
from hypersd_jax.weights.diffusers.controlnet import LoadedControlNet
from hypersd_jax.weights.hub import fetch_lora
from hypersd_jax.weights.lora import LoraReport


class LoadedModel:
    """A base model, and what is loaded beside it."""

    def __init__(self, base: TextToImage) -> None:
        self.base = base
        self._params: Mapping[str, Mapping[str, jax.Array]] = base.params
        self._fused: Mapping[str, Mapping[str, jax.Array]] | None = None
        self._controlnets: dict[str, LoadedControlNet] = {}
        self._loras = LoraStack(base.shapes, base.mesh)
        self._programs = compile_programs(base)
        self._most_bytes: int | None = None
        self._prepared: tuple[Params, Params] | None = None

    def __repr__(self) -> str:
        return described(self.base, self._loras.loaded(), fused=self._fused is not None)

    @property
    def dtype(self) -> Any:
        """Data type of the computation."""
        return self.base.dtype

    @property
    def mesh(self) -> Mesh | None:
        """Devices that parameters and batches are split over; None is one device."""
        return self.base.mesh

    @property
    def schedule(self) -> Schedule:
        """Noise schedule of the model."""
        return self.base.schedule

    @property
    def native_size(self) -> tuple[int, int]:
        """The images' height and width in pixels where none are asked for."""
        return self._size(None, None)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, dtype: Any = None, mesh: Mesh | None = None, **unknown: Any
    ) -> Self:
        """Load a model.

        Args:
            source: a diffusers folder, a single .safetensors file, the hub id of either (``owner/name``), or
                ``embedded`` for the small model inside the package.
            dtype: of parameters and arithmetic; None is bfloat16 on TPU and GPU, float32 on a CPU.
            mesh: devices with axes ``data`` and ``fsdp``; batches are split over both, and filled
                up where they do not divide evenly, large parameters over ``fsdp``.

        Raises:
            UserError: one line naming the file or key that is missing, unsupported or damaged.
        """
        refuse_unknown(unknown, cls.from_pretrained)
        return cls(load_base(source, dtype=parse_dtype(dtype), mesh=mesh))

    def beside(self, *, controlnets: bool = False) -> Self:
        """Another pipeline of the same base weights and compiled programs, with LoRAs of its own: none yet.

        Args:
            controlnets: whether it has the ControlNets that are loaded here.
        """
        other = type(self)(self.base)
        other._programs = self._programs
        if controlnets:
            other._controlnets.update(self._controlnets)
        return other

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
        """Remove one LoRA, or all of them."""
        self._require_unfused("unload_lora")
        self._loras.remove(name)

    def fuse_lora(self) -> None:
        """Write the loaded LoRAs into the weights, which makes every call a little cheaper."""
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

    # MARK: speed

    def prepare(self, most_bytes: int | None = None) -> None:
        """Make many calls on a CPU faster, for memory: transform 3x3 kernels of frozen float32 weights.

        It costs about a second for Stable Diffusion 1.5, and programs are compiled anew, so it is for many calls of
        large models; images change by rounding alone. What the weights become later (LoRAs fused or altered, another
        autoencoder) is transformed again. Elsewhere, on several devices and for small models it changes nothing.

        Args:
            most_bytes: of the transformed kernels; None is a quarter of the memory that is free now. Where they do not
                all fit, those come first that save most time a byte.
        """
        self._most_bytes = free_memory() // 4 if most_bytes is None else most_bytes
        self._prepared = None

    # MARK: other parts

    def load_vae(self, source: str | Path) -> None:
        """Use another autoencoder, such as a tiny one (TAESD): a diffusers folder, a file, or a hub id.

        Raises:
            UserError: it cannot be read, or does not fit the model's latents.
        """
        base = self.base.with_autoencoder(source)
        for net in self._controlnets.values():
            base.require_controlnet(net)
        self.base, self._params = base, base.params
        if self._fused is not None:
            self._fused = {**self._fused, base.autoencoder: base.params[base.autoencoder]}
        self._programs = with_autoencoder(self._programs, base)

    def load_controlnet(self, source: str | Path, name: str | None = None) -> None:
        """Add a ControlNet: a diffusers folder, a file, or a hub id; the same ``name`` (default: the source) replaces.

        From then on every call needs a `control_image` for each.

        Raises:
            UserError: it cannot be read, or does not fit the model.
        """
        found = self.base.load_controlnet(source)
        if (channels := found.config.conditioning_channels) != 3:
            raise UserError(f"{source}: conditioning_channels={channels}, but images have 3")
        self._controlnets[name or str(source)] = found

    def unload_controlnet(self, name: str | None = None) -> None:
        """Remove one ControlNet, or all of them."""
        if name is None:
            self._controlnets.clear()
        elif self._controlnets.pop(name, None) is None:
            raise UserError(f"no ControlNet named {name!r} is loaded{nearest(name, self._controlnets)}")

    def active(self) -> ActiveModel:
        """The model with the weights, LoRAs and ControlNets of this moment."""
        fused = self._fused
        params = self._loras.altered(self._params) if fused is None else fused
        return ActiveModel(
            base=self.base,
            programs=self._programs,
            params=self._for_programs(params),
            adapters=self._loras.adapters() if fused is None else {},
            controlnets=tuple(self._controlnets.values()),
            base_params=self._params,
        )

    def _for_programs(self, params: Params) -> Params:
        """Parameters with what `prepare` adds, made once for as long as they stay the same."""
        if self._most_bytes is None:
            return params
        if self._prepared is None or self._prepared[0] is not params:
            self._prepared = None  # before more memory is taken
            self._prepared = params, self.base.prepared(params, self._most_bytes)
        return self._prepared[1]

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, the model's own where None."""
        h, w = arguments.latent_size(height, width, self.base.native_size, self.base.downscale)
        return h * self.base.downscale, w * self.base.downscale
