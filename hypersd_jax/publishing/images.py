"""Reference images: what a LoRA samples from a few prompts, each with a seed that anybody can sample again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline, to_pil
from hypersd_jax.pipeline.arguments import about_not_finite, not_finite
from hypersd_jax.png_text import UsedLora, lora_hash, name_of, parameters_text, save_images
from hypersd_jax.publishing.contents import Exported


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An image, by its path in the published folder, and what made it: prompt 0 of a call with this seed."""

    path: str
    prompt: str
    seed: int


def sample_references(
    folder: Path, pipe: Pipeline, loras: Sequence[Exported], prompts: Sequence[str], *, count: int, seed: int, base: str
) -> dict[str, list[Reference]]:
    """Sample images with each LoRA, at the settings of its header, and save them with their text in images/.

    Args:
        folder: the published one.
        pipe: the base, without LoRAs.
        loras: of the run.
        prompts: taken in turn.
        count: of images for each LoRA.
        seed: of the first; the next have the next.
        base: what the base is called.

    Raises:
        UserError: an image is not finite.
    """
    found: dict[str, list[Reference]] = {}
    for lora in loras:
        pipe.load_lora(lora.file)
        used = [UsedLora(name=name_of(lora.file), scale=1.0, hash=lora_hash(lora.file))]
        for number in range(count):
            prompt, own_seed = prompts[number % len(prompts)], seed + number
            width, height = lora.recipe.size
            # Step by step, so that LoRAs of several step counts share one compiled program.
            call: dict[str, Any] = {"width": width, "height": height, "output": "np", "stepwise": True}
            images, settings = pipe.generate([prompt], seed=own_seed, **call)
            if broken := not_finite(np.asarray(images)):
                raise UserError(f"{lora.file}: {about_not_finite(broken, len(images), pipe.dtype)}")
            path = f"images/{lora.recipe.name}-{number}.png"
            text = parameters_text(prompt, settings, model=name_of(base), loras=used, more={"Image": "0.0"})
            save_images(to_pil(images), folder / path, [text])
            found.setdefault(lora.recipe.name, []).append(Reference(path=path, prompt=prompt, seed=own_seed))
        pipe.unload_lora()
    return found
