"""From a run's folder to the folder that is published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from hypersd_jax.bases import describe_base
from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.config import Config
from hypersd_jax.interop.recipe import example_prompt
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.publishing.contents import exported_files, read_contents
from hypersd_jax.publishing.folder import write_folder
from hypersd_jax.sampling_command import EMBEDDED_PROMPTS


def write_publication(
    folder: Path,
    config: Config,
    target: Path,
    repo: str,
    *,
    licence: str,
    licence_is: str,
    prompts: Sequence[str],
    images: int,
    seed: int,
    base_model: str | None,
) -> tuple[list[Path], Sequence[str]]:
    """Write what is published of a run, and return the files, and what of the run is not among them.

    Args:
        folder: the run's.
        config: its configuration.
        target: a folder that `check_target` has passed.
        repo: the hub id.
        licence, licence_is: from `find_licence`.
        prompts: of the reference images; empty: examples.
        images: how many of each LoRA.
        seed: of the first.
        base_model: the base's id on the hub, where the author says it.

    Raises:
        UserError: the run has no LoRA, its base cannot be read, or the folder cannot be written.
    """
    exported_files(folder, config)
    source = config.model.source
    base = describe_base(source, dtype=jnp.float32, resolution=config.data.resolution)
    prompts = prompts or (EMBEDDED_PROMPTS if config.on_emoji else [example_prompt(source)])
    contents = read_contents(folder, config, base, base_model=base_model, prompts=prompts)
    pipe = None
    if images:
        use_compilation_cache()
        pipe = Pipeline.from_pretrained(source)
    how: dict[str, Any] = {"prompts": prompts, "images": images, "seed": seed}
    files = write_folder(target, contents, repo, licence=licence, licence_is=licence_is, pipe=pipe, **how)
    return files, contents.left_out
