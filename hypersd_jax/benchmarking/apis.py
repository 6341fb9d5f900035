"""The phases of a call on several devices by `jax.pmap`, by `jax.jit` with shardings, and by `jax.shard_map`.

Each API gets the same functions, weights and inputs: weights whole on every device, images split evenly. `jax.pmap` is
in maintenance mode since jax 0.8, and is used nowhere else in the package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hypersd_jax.benchmarking.phases import DECODE, DENOISE, TEXT, Phase, Workload
from hypersd_jax.pipeline.active import ActiveModel
from hypersd_jax.training import replicated
from hypersd_jax.weights.placement import batch_sharding

TRANSFER = "transfer"


class Run(NamedTuple):
    """A call that was run.

    Attributes:
        images: (B, H, W, 3) in 0..1, on the host.
        seconds: by phase; the phases are waited for one by one. Moving inputs to the devices is in each phase's own.
        compile_seconds: tracing and compiling of the programs that the call used, whenever that was.
        program_bytes: what the largest of these programs holds on a device at least: arguments, results and
            temporaries; None where the backend does not say.
    """

    images: np.ndarray
    seconds: dict[str, float]
    compile_seconds: float
    program_bytes: int | None


class Program(NamedTuple):
    """A compiled phase, and the seconds that tracing and compiling it took."""

    call: Any
    seconds: float


class Runner:
    """One API with the programs that were compiled for it."""

    def __init__(self, api: str, phases: Mapping[str, Phase], model: ActiveModel, mesh: Mesh) -> None:
        """Wrap the phases.

        Args:
            api: a key of `WRAPPERS`.
            phases: of a base on the mesh for ``jit``, which splits the whole batch, else of one without a mesh.
            model: whose weights and LoRAs lie whole on every device.
            mesh: the devices, all along ``data``.
        """
        self._wrapped = {name: WRAPPERS[api](*phase, mesh) for name, phase in phases.items()}
        self._model = model
        self._compiled: dict[Any, Program] = {}
        self._has_device_axis = api == "pmap"
        self._devices = mesh.size

    def run(self, work: Workload) -> Run:
        """Sample one batch, phase by phase; what is not compiled yet for its shapes is compiled before, and apart."""
        model, base = self._model, self._model.base
        encoders = {name: model.params[name] for name in base.text_encoders}
        adapters = {name: model.adapters[name] for name in base.text_encoders if name in model.adapters}
        seconds: dict[str, float] = {}
        used: list[Program] = []

        def timed(phase: str, *arguments: Any) -> Any:
            program = self._program(phase, arguments)
            used.append(program)
            begin = time.perf_counter()
            result = jax.block_until_ready(program.call(*arguments))
            seconds[phase] = time.perf_counter() - begin
            return result

        tokens, latents, noise = self._by_device(work.tokens), self._by_device(work.latents), work.noise
        conditioning = timed(TEXT, encoders, adapters, tokens, self._by_device(work.negatives))
        scale, noise = np.float32(work.settings.guidance), self._by_device(noise, 1)
        last = timed(DENOISE, *model.denoiser, scale, work.table, conditioning, latents, noise)
        result = timed(DECODE, model.params[base.autoencoder], last)
        begin = time.perf_counter()
        images = np.asarray(result)
        seconds[TRANSFER] = time.perf_counter() - begin
        return Run(
            images=images.reshape(-1, *images.shape[-3:]),
            seconds=seconds,
            compile_seconds=sum(program.seconds for program in used),
            program_bytes=_most_bytes(used),
        )

    def _program(self, phase: str, arguments: tuple[Any, ...]) -> Program:
        leaves, structure = jax.tree.flatten(arguments)
        key = phase, structure, tuple(np.shape(leaf) for leaf in leaves)
        if key not in self._compiled:
            begin = time.perf_counter()
            call = self._wrapped[phase].lower(*arguments).compile(dict(self._model.base.compiler_options))
            self._compiled[key] = Program(call, time.perf_counter() - begin)
        return self._compiled[key]

    def _by_device(self, tree: Any, axis: int = 0) -> Any:
        """Give arrays an axis of devices before their batch axis, where the API wants one."""
        if not self._has_device_axis:
            return tree

        def cut(array: np.ndarray) -> np.ndarray:
            return array.reshape(*array.shape[:axis], self._devices, -1, *array.shape[axis + 1 :])

        return jax.tree.map(cut, tree)


def _pmapped(function: Callable[..., Any], axes: tuple[int | None, ...], mesh: Mesh) -> Any:
    return jax.pmap(function, in_axes=axes, devices=list(mesh.devices.flat))


def _jitted(function: Callable[..., Any], axes: tuple[int | None, ...], mesh: Mesh) -> Any:
    return jax.jit(function, in_shardings=_shardings(axes, mesh), out_shardings=batch_sharding(mesh))


def _shard_mapped(function: Callable[..., Any], axes: tuple[int | None, ...], mesh: Mesh) -> Any:
    shardings = _shardings(axes, mesh)
    # The check of what varies over the devices does not know the attention kernels of GPU and TPU.
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(sharding.spec for sharding in shardings),
        out_specs=batch_sharding(mesh).spec,
        check_vma=False,
    )
    return jax.jit(mapped, in_shardings=shardings)


def _shardings(axes: tuple[int | None, ...], mesh: Mesh) -> tuple[NamedSharding, ...]:
    return tuple(replicated(mesh) if axis is None else batch_sharding(mesh, axis) for axis in axes)


WRAPPERS: dict[str, Callable[[Callable[..., Any], tuple[int | None, ...], Mesh], Any]] = {
    "pmap": _pmapped,
    "jit": _jitted,
    "shard_map": _shard_mapped,
}


def _most_bytes(programs: list[Program]) -> int | None:
    found = [program.call.memory_analysis() for program in programs]
    if None in found:
        return None
    return max(
        each.argument_size_in_bytes + each.output_size_in_bytes + each.temp_size_in_bytes - each.alias_size_in_bytes
        for each in found
    )
