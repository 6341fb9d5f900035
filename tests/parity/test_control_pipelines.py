"""ControlNet and the tiny autoencoder against diffusers' pipelines: text, image to image and inpainting.

As in `test_image_pipelines`, diffusers encodes by the posterior's mean here. The largest relative error
measured is 2.2e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from hypersd_jax.pipeline import Pipeline
from tests.helpers.image_runs import HEIGHT, PROMPTS, WIDTH, random_image, sample_both
from tests.helpers.tiny_pipelines import tiny_sd, tiny_sdxl
from tests.helpers.torch_weights import perturb, relative_error

TOLERANCE = 1e-4
ANOTHER = 2e-3
SIZE = {"height": HEIGHT, "width": WIDTH}
FAMILIES = {"sd": (tiny_sd, 4), "sd-9": (tiny_sd, 9), "sdxl": (tiny_sdxl, 4)}
TASKS = {
    "text": ("StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"),
    "image": ("StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionXLControlNetImg2ImgPipeline"),
    "inpaint": ("StableDiffusionControlNetInpaintPipeline", "StableDiffusionXLControlNetInpaintPipeline"),
}


def write_control(folder: Path, unet: Path, seed: int, *, pooled: bool = False) -> Path:
    """A ControlNet for a UNet of 4 channels, whose convolutions that start at zero are random."""
    torch.manual_seed(seed)
    base = diffusers.UNet2DConditionModel.from_pretrained(unet)
    net = diffusers.ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(4, 6))
    net.register_to_config(global_pool_conditions=pooled)
    with torch.no_grad():
        for parameter in perturb(net, seed, 0.05).parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            block.weight.normal_(0, 0.5)
    net.save_pretrained(folder)
    return folder


class Models:
    """Each family and its ControlNets, read when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ours: dict[str, Pipeline] = {}
        self.theirs: dict[tuple[str, str, tuple[str, ...]], Any] = {}

    def path(self, family: str) -> Path:
        """The model's folder."""
        make, channels = FAMILIES[family]
        folder = self.folder / family
        return folder if folder.exists() else make(folder, in_channels=channels)

    def control(self, family: str, kind: str) -> Path:
        """The folder of a ControlNet: a first one, or one that averages over space."""
        folder = self.folder / f"{family[:4].rstrip('-')}-{kind}"
        if not folder.exists():
            unet = self.path("sdxl" if family == "sdxl" else "sd") / "unet"
            write_control(folder, unet, {"first": 4, "pooled": 6}[kind], pooled=kind == "pooled")
        return folder

    def pair(self, family: str, task: str, kinds: tuple[str, ...]) -> tuple[Any, Pipeline]:
        """Their pipeline for a task with these ControlNets, and ours, which does all."""
        folders = [self.control(family, kind) for kind in kinds]
        if (family, task, kinds) not in self.theirs:
            nets = [diffusers.ControlNetModel.from_pretrained(folder) for folder in folders]
            cls = getattr(diffusers, TASKS[task][family == "sdxl"])
            made = cls.from_pretrained(self.path(family), controlnet=nets[0] if len(nets) == 1 else nets)
            made.set_progress_bar_config(disable=True)
            self.theirs[family, task, kinds] = made
        if family not in self.ours:
            self.ours[family] = Pipeline.from_pretrained(self.path(family))
        ours = self.ours[family]
        if list(ours._controlnets) != list(kinds):
            ours.unload_controlnet()
            for kind, folder in zip(kinds, folders, strict=True):
                ours.load_controlnet(folder, name=kind)
        return self.theirs[family, task, kinds], ours


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def run_both(
    models: Models,
    family: str,
    task: str,
    control: Any,
    *,
    kinds: tuple[str, ...] = ("first",),
    scale: Any = 0.8,
    guess: bool = False,
    sampler: str = "ddim",
    steps: int = 2,
    **call: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Ours and theirs, with an image to start from and a mask where the task has them."""
    theirs, ours = models.pair(family, task, kinds)
    their: dict[str, Any] = {"controlnet_conditioning_scale": scale, "guess_mode": guess, **SIZE}
    our: dict[str, Any] = {"control_image": control, "control_scale": scale, "guess_mode": guess, **SIZE}
    their["image" if task == "text" else "control_image"] = control
    if task != "text":
        their["image"] = our["image"] = random_image(0)
    if task == "inpaint":
        their["mask_image"] = our["mask"] = random_image(2, mode="L")
    return sample_both(theirs, ours, sampler=sampler, steps=steps, their=their, our=our, **call)


@pytest.mark.parametrize(
    ("family", "guidance", "guess"),
    [("sd", 0.0, False), ("sd", 5.0, False), ("sd", 5.0, True), ("sdxl", 5.0, False), ("sdxl", 5.0, True)],
)
def test_text_to_image(models: Models, family: str, guidance: float, guess: bool) -> None:
    for sampler, eta, steps in (("ddim", 0.0, 1), ("tcd", 0.3, 2), ("euler", 0.0, 4)):
        call = {"sampler": sampler, "eta": eta, "steps": steps, "guidance": guidance, "guess": guess}
        found, expected = run_both(models, family, "text", random_image(7), negative="blob style", **call)
        assert relative_error(found, expected) < TOLERANCE, sampler
    other, _ = run_both(models, family, "text", random_image(8), negative="blob style", **call)
    assert relative_error(other, expected) > ANOTHER
    weaker, expected = run_both(models, family, "text", random_image(7), negative="blob style", **call, scale=0.3)
    assert relative_error(weaker, expected) < TOLERANCE
    assert relative_error(weaker, found) > ANOTHER


def test_guess_mode_without_guidance(models: Models) -> None:
    found, expected = run_both(models, "sd", "text", random_image(7), guidance=0.0, guess=True)
    assert relative_error(found, expected) < TOLERANCE


def test_an_image_for_each_prompt_of_another_size(models: Models) -> None:
    call = {"guidance": 5.0, "steps": 4}
    images = [random_image(7, (30, 22)), random_image(8, (17, 9))]
    found, expected = run_both(models, "sd", "text", images, **call)
    assert relative_error(found, expected) < TOLERANCE
    found, expected = run_both(models, "sd", "text", random_image(7), prompts=PROMPTS[:1], num_images=2, **call)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("kinds", [("pooled",), ("first", "pooled")])
def test_kinds_and_several(models: Models, kinds: tuple[str, ...]) -> None:
    """One that averages over space steers the prompted half alone; of several, the first one's kind decides."""
    images = [random_image(7), random_image(8)][: len(kinds)]
    scales = [0.8, 0.4][: len(kinds)]
    one = len(kinds) == 1
    call = {"guidance": 5.0, "kinds": kinds, "scale": scales[0] if one else scales}
    found, expected = run_both(models, "sd", "text", images[0] if one else images, **call)
    assert relative_error(found, expected) < TOLERANCE
    if not one:
        swapped, _ = run_both(models, "sd", "text", images[::-1], **call)
        assert relative_error(swapped, expected) > ANOTHER


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_image_to_image(models: Models, family: str) -> None:
    for sampler, eta, steps, strength in (("ddim", 0.0, 2, 0.5), ("tcd", 0.3, 4, 0.8), ("euler_a", 0.0, 8, 0.3)):
        call = {"sampler": sampler, "eta": eta, "steps": steps, "strength": strength, "guidance": 5.0}
        found, expected = run_both(models, family, "image", random_image(7), **call)
        assert relative_error(found, expected) < TOLERANCE, sampler


@pytest.mark.parametrize("family", ["sd", "sd-9", "sdxl"])
def test_inpainting(models: Models, family: str) -> None:
    for sampler, eta, steps, strength in (("ddim", 0.0, 4, 1.0), ("tcd", 0.3, 4, 0.8), ("euler_a", 0.0, 8, 0.3)):
        call = {"sampler": sampler, "eta": eta, "steps": steps, "strength": strength, "guidance": 5.0}
        found, expected = run_both(models, family, "inpaint", random_image(7), **call)
        assert relative_error(found, expected) < TOLERANCE, sampler


def test_the_tiny_autoencoder(models: Models, tmp_path: Path) -> None:
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    perturb(diffusers.AutoencoderTiny(**widths, **blocks), 1).save_pretrained(tmp_path)
    tiny = diffusers.AutoencoderTiny.from_pretrained(tmp_path)
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(models.path("sd"), vae=tiny)
    theirs.set_progress_bar_config(disable=True)
    ours = Pipeline.from_pretrained(models.path("sd"))
    ours.load_vae(tmp_path)
    call = {"sampler": "ddim", "steps": 4, "strength": 0.5, "guidance": 0.0, "output": "np"}
    found, expected = sample_both(
        theirs, ours, their={"image": random_image(0)}, our={"image": random_image(0)}, **call
    )
    assert relative_error(found, expected) < TOLERANCE
