"""The folder that is published: built under another name, and put in place as a whole."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from hypersd_jax.errors import UserError
from hypersd_jax.interop.beside import write_beside
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.publishing.card import model_card
from hypersd_jax.publishing.contents import Contents
from hypersd_jax.publishing.images import Reference, sample_references
from hypersd_jax.publishing.target import MARK


def write_folder(
    target: Path,
    contents: Contents,
    repo: str,
    *,
    licence: str,
    licence_is: str,
    pipe: Pipeline | None,
    prompts: Sequence[str],
    images: int,
    seed: int,
) -> list[Path]:
    """Write the card, the LoRAs with what lies beside each, images and results; return the files.

    Args:
        target: a folder that `check_target` has passed.
        contents: the run.
        repo: the hub id that it is published under.
        licence, licence_is: see `model_card`.
        pipe: the base, without LoRAs; None where no images are sampled.
        prompts, images, seed: see `sample_references`.

    Raises:
        UserError: it cannot be written, or an image is not finite; the target is then as it was.
    """
    new = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        new.mkdir(parents=True)
        (new / MARK).touch()
        for lora in contents.loras:
            shutil.copyfile(lora.file, new / lora.file.name)
            for part in lora.parts:
                shutil.copyfile(part, new / part.name)
            write_beside(new / lora.file.name, lora.recipe)
        references: dict[str, list[Reference]] = {}
        if pipe is not None and images:
            how = {"count": images, "seed": seed}
            references = sample_references(new, pipe, contents.loras, prompts, base=contents.base, **how)
        if contents.grid is not None:
            shutil.copyfile(contents.grid, new / "grid.png")
        if contents.rows:
            (new / "results.json").write_text(json.dumps(contents.rows, indent=1) + "\n", encoding="utf-8")
        card = model_card(contents, repo, references, licence=licence, licence_is=licence_is)
        (new / "README.md").write_text(card, encoding="utf-8")
        if target.is_dir():
            shutil.rmtree(target)
        new.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return sorted(path for path in target.rglob("*") if path.is_file() and path.name != MARK)
