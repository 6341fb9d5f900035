"""Image to image and inpainting against diffusers' pipelines: the same images, masks, start and noise.

Ours encodes images by the mean of the autoencoder's posterior, where diffusers samples from it: here it takes the mean
too (`tests.helpers.image_runs.fed`). Images are not square. The largest relative error measured is 2.4e-6.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights import write_lora
from tests.helpers.image_runs import HEIGHT, PROMPTS, WIDTH, random_image, sample_both
from tests.helpers.lora_files import random_adapter
from tests.helpers.tiny_pipelines import tiny_sd, tiny_sdxl
from tests.helpers.torch_weights import relative_error

TOLERANCE = 1e-4
ANOTHER = 1e-2
SIZE = {"height": HEIGHT, "width": WIDTH}
SAMPLERS = [("ddim", 0.0), ("tcd", 0.3), ("lcm", 0.0), ("euler", 0.0), ("euler_a", 0.0), ("dpmpp_2m", 0.0)]
# Few steps need a high strength: steps times strength is at least 1 in each.
SHARES = [(2, 0.5), (2, 1.0), (4, 0.8), (8, 0.3)]
FAMILIES = {
    "sd": (tiny_sd, 4, diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline),
    "sd-9": (tiny_sd, 9, None, diffusers.StableDiffusionInpaintPipeline),
    "sdxl": (tiny_sdxl, 4, diffusers.StableDiffusionXLImg2ImgPipeline, diffusers.StableDiffusionXLInpaintPipeline),
    "sdxl-9": (tiny_sdxl, 9, None, diffusers.StableDiffusionXLInpaintPipeline),
}


class Models:
    """Each family, read when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ours: dict[str, Pipeline] = {}
        self.theirs: dict[str, list[Any]] = {}

    def pair(self, family: str, *, inpaint: bool) -> tuple[Any, Pipeline]:
        """Their pipeline for a task, and ours, which does both."""
        if family not in self.ours:
            make, channels, *classes = FAMILIES[family]
            folder = make(self.folder / family, in_channels=channels)
            self.ours[family] = Pipeline.from_pretrained(folder)
            self.theirs[family] = [cls and cls.from_pretrained(folder) for cls in classes]
            for pipe in self.theirs[family]:
                if pipe is not None:
                    pipe.set_progress_bar_config(disable=True)
        return self.theirs[family][inpaint], self.ours[family]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def in_colour(image: Any) -> Any:
    """What diffusers' pipelines take without a conversion: three channels."""
    if isinstance(image, list):
        return [in_colour(each) for each in image]
    white = Image.new("RGBA", image.size, "white")  # where diffusers would show the colour of what is transparent
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def image_to_image(models: Models, family: str, image: Any, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    theirs, ours = models.pair(family, inpaint=False)
    return sample_both(theirs, ours, their={"image": in_colour(image)}, our={"image": image}, **call)


def inpaint(models: Models, family: str, image: Any, mask: Any, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    theirs, ours = models.pair(family, inpaint=True)
    their = {"image": in_colour(image), "mask_image": mask, **SIZE}
    return sample_both(theirs, ours, their=their, our={"image": image, "mask": mask, **SIZE}, **call)


@pytest.mark.parametrize(("family", "guidance"), [("sd", 0.0), ("sd", 5.0), ("sdxl", 5.0)])
def test_image_to_image(models: Models, family: str, guidance: float) -> None:
    for (sampler, eta), (steps, strength) in product(SAMPLERS if family == "sd" else SAMPLERS[1::2], SHARES):
        call = {"sampler": sampler, "eta": eta, "steps": steps, "strength": strength, "guidance": guidance}
        found, expected = image_to_image(models, family, random_image(0), **call)
        assert relative_error(found, expected) < TOLERANCE, (sampler, steps, strength)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_decoded(models: Models, family: str) -> None:
    call = {"sampler": "tcd", "eta": 0.3, "steps": 4, "strength": 0.8, "guidance": 5.0, "output": "np"}
    found, expected = image_to_image(models, family, random_image(0), **call)
    assert found.shape == (2, HEIGHT, WIDTH, 3)
    assert relative_error(found, expected) < TOLERANCE
    found, expected = inpaint(models, family, random_image(0), random_image(2, mode="L"), **call)
    assert relative_error(found, expected) < TOLERANCE


def test_a_share_that_float32_would_round(models: Models) -> None:
    found, expected = image_to_image(
        models, "sd", random_image(0), sampler="ddim", steps=10, strength=0.7, guidance=0.0
    )
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_an_image_for_each_prompt(models: Models, family: str) -> None:
    call = {"sampler": "ddim", "steps": 4, "strength": 0.5, "guidance": 5.0, "negative": "blob style"}
    found, expected = image_to_image(models, family, [random_image(0), random_image(1)], **call)
    assert relative_error(found, expected) < TOLERANCE
    other, _ = image_to_image(models, family, [random_image(1), random_image(0)], **call)
    assert relative_error(other, expected) > ANOTHER


def test_several_images_of_one_prompt(models: Models) -> None:
    call = {"sampler": "tcd", "eta": 0.3, "steps": 4, "strength": 0.5, "guidance": 5.0, "num_images": 2}
    found, expected = image_to_image(models, "sd", random_image(0), prompts=PROMPTS[:1], **call)
    assert relative_error(found, expected) < TOLERANCE
    mask = random_image(2, mode="L")
    found, expected = inpaint(models, "sd", random_image(0), mask, prompts=PROMPTS[:1], **call)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_the_size_of_the_image(models: Models, mode: str) -> None:
    """Rounded down to what the autoencoder takes, by Lanczos."""
    image = random_image(3, (HEIGHT + 1, WIDTH + 1), mode)
    found, expected = image_to_image(models, "sd", image, sampler="ddim", steps=4, strength=0.5, guidance=0.0)
    assert found.shape == (2, HEIGHT // 2, WIDTH // 2, 4)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(("family", "guidance"), [("sd", 0.0), ("sd-9", 5.0), ("sdxl", 5.0), ("sdxl-9", 5.0)])
def test_inpainting(models: Models, family: str, guidance: float) -> None:
    """A grey mask, of which 0.5 and more is painted; models that read it, and models that do not."""
    for (sampler, eta), (steps, strength) in product(SAMPLERS if family == "sd" else SAMPLERS[1::2], SHARES):
        call = {"sampler": sampler, "eta": eta, "steps": steps, "strength": strength, "guidance": guidance}
        found, expected = inpaint(models, family, random_image(0), random_image(2, mode="L"), **call)
        assert relative_error(found, expected) < TOLERANCE, (sampler, steps, strength)


@pytest.mark.parametrize("family", ["sd", "sd-9"])
def test_images_and_masks_of_another_size(models: Models, family: str) -> None:
    """Image and mask are each resized by Lanczos before the mask is made black and white."""
    for image, mask in (
        (random_image(4, (40, 50)), random_image(5, (9, 31), "L")),
        (random_image(4, (7, 9), "RGBA"), random_image(5, (33, 20))),
        (random_image(4, (40, 50), "L"), random_image(5, (50, 40), "L").convert("1")),
    ):
        call = {"sampler": "ddim", "steps": 4, "strength": 0.8, "guidance": 5.0}
        found, expected = inpaint(models, family, image, mask, **call)
        assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["sd", "sd-9"])
def test_an_image_and_a_mask_for_each_prompt(models: Models, family: str) -> None:
    images, masks = [random_image(0), random_image(1)], [random_image(2, mode="L"), random_image(3, mode="L")]
    call = {"sampler": "ddim", "steps": 4, "strength": 0.8, "guidance": 5.0}
    found, expected = inpaint(models, family, images, masks, **call)
    assert relative_error(found, expected) < TOLERANCE
    other, _ = inpaint(models, family, images, masks[::-1], **call)
    assert relative_error(other, expected) > ANOTHER


def test_with_a_lora(models: Models, tmp_path: Path) -> None:
    theirs, ours = models.pair("sd", inpaint=True)
    call = {"sampler": "ddim", "steps": 4, "strength": 0.8, "guidance": 0.0}
    base, _ = inpaint(models, "sd", random_image(0), random_image(2, mode="L"), **call)
    file = tmp_path / "lora.safetensors"
    write_lora(file, {"unet": random_adapter(ours.base.shapes["unet"], 1, scale=0.3)}, layout="kohya")
    ours.load_lora(file)
    theirs.load_lora_weights(tmp_path, weight_name=file.name)
    try:
        found, expected = inpaint(models, "sd", random_image(0), random_image(2, mode="L"), **call)
    finally:
        ours.unload_lora()
        theirs.unload_lora_weights()
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(found, base) > ANOTHER
