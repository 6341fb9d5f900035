"""Calls with images, and models with other parts loaded: what needs no other implementation, on tiny models."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image
from safetensors.numpy import save_file

from hypersd_jax.errors import UserError
from hypersd_jax.models import ControlNetConfig, TinyVaeConfig, UNetConfig, VaeConfig, controlnet, tiny_vae, unet, vae
from hypersd_jax.pipeline import Pipeline, image_inputs
from hypersd_jax.weights import write_lora
from hypersd_jax.weights.diffusers.component import save_params
from tests.helpers.compilations import Compilations
from tests.helpers.lora_files import random_adapter
from tests.helpers.lora_kinds import random_kind
from tests.helpers.tiny_model import UNET, VAE, tiny_model

PROMPT = "red apple, fluent flat style"
PROMPTS = [PROMPT, "a cat face", "lion, blob style"]
CALL: dict[str, Any] = {"steps": 2, "guidance": 0.0, "output": "latent"}
SAME, ANOTHER = 1e-5, 1e-3
"""Relative L2: float32 in another order of sums at most, and a change that must be seen."""
SIDE = 16
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.random((3, SIDE, SIDE, 3)).astype(np.float32)
MASK = np.zeros((SIDE, SIDE), np.float32)
MASK[:, : SIDE // 2] = 1
CONTROL: dict[str, Any] = {
    **{key: UNET[key] for key in UNET if key not in ("_class_name", "sample_size", "up_block_types")},
    "conditioning_embedding_out_channels": [4, 6],
}
TINY_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two ControlNets beside it, and a tiny autoencoder."""
    root = tmp_path_factory.mktemp("models")
    network = controlnet(ControlNetConfig.from_dict(CONTROL))
    for seed, name in enumerate(("control-a", "control-b")):
        save_params(root / name, network.init(seed), config=CONTROL, component_kind="unet")
    tiny = tiny_vae(TinyVaeConfig.from_dict(TINY_VAE))
    save_params(root / "taesd", tiny.init(0), config=TINY_VAE, component_kind="vae")
    return tiny_model(root / "model").parent


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder / "model")


@pytest.fixture
def pipe(loaded: Pipeline) -> Any:
    yield loaded
    loaded.unload_lora()
    loaded.unload_controlnet()


@pytest.fixture(scope="module")
def inpainter(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    model = tiny_model(tmp_path_factory.mktemp("models") / "inpaint")
    config = {**UNET, "in_channels": 9}
    params = unet(UNetConfig.from_dict(config)).init(0)
    save_params(model / "unet", params, config=config, component_kind="unet")
    return Pipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def compilations() -> Compilations:
    return Compilations.counting()


def difference(found: Any, expected: Any) -> float:
    """Relative L2."""
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


# MARK: what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"strength": 0.5}, "strength: image must be given with it"),
        ({"mask": MASK}, "mask: image must be given with it"),
        ({"image": IMAGES[0], "strength": 0.0}, "strength must be above 0 and at most 1"),
        ({"image": IMAGES[0], "strength": 1.5}, "strength must be above 0 and at most 1"),
        ({"image": IMAGES[0], "strength": float("nan")}, "strength holds values that are not finite"),
        ({"image": IMAGES[0], "strength": "high"}, "strength is not a number"),
        ({"image": IMAGES[0], "strength": 0.3}, "strength=0.3 of 2 steps leaves none"),
        ({"image": IMAGES[0], "height": 32}, r"image has shape \(16, 16, 3\), not \(32, 16, 3\)"),
        ({"image": IMAGES[0, ..., :1]}, r"image has shape \(16, 16, 1\), not \(16, 16, 3\)"),
        ({"image": IMAGES[0, :, :, 0]}, r"image has shape \(16, 16\), not \(16, 16, 3\)"),
        ({"image": np.zeros(16)}, r"image has shape \(16,\), not that of an image"),
        ({"image": np.zeros((0, SIDE, SIDE, 3))}, "image: none given"),
        ({"image": []}, "image: none given"),
        ({"image": 5}, "image must be an image, a path or an array, not int"),
        ({"image": np.full((SIDE, SIDE, 3), "x")}, "image is not a number or a regular array of numbers"),
        ({"image": 255 * IMAGES[0]}, r"image holds values outside 0\.\.1"),
        ({"image": IMAGES[0] - 1}, r"image holds values outside 0\.\.1"),
        ({"image": IMAGES[0] * np.nan}, "image holds values that are not finite"),
        ({"image": Image.new("RGB", (1, 1))}, "height=0 must be a positive multiple of 2"),
        ({"image": IMAGES}, "image: 3 given for 1 prompts"),
        ({"image": "nowhere.png"}, "image nowhere.png: cannot be read as an image"),
        ({"image": Path(__file__)}, r"image .*test_image_calls\.py: cannot be read as an image"),
        ({"image": IMAGES[0], "mask": MASK[:8]}, r"mask has shape \(8, 16, 1\), not \(16, 16, 1\)"),
        ({"image": IMAGES[0], "mask": 2 * MASK}, r"mask holds values outside 0\.\.1"),
        ({"image": IMAGES[0], "mask": [MASK] * 2}, "mask: 2 given for 1 prompts"),
        ({"control_image": IMAGES[0]}, "control_image: no ControlNet is loaded"),
        ({"control_scale": 0.5}, "control_scale: no ControlNet is loaded"),
        ({"guess_mode": True}, "guess_mode: no ControlNet is loaded"),
        ({"long_prompts": "chunks"}, "long_prompts='chunks' is not valid; did you mean chunk"),
    ],
)
def test_bad_images_are_named(loaded: Pipeline, call: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loaded(PROMPT, **{**CALL, **call})


@pytest.mark.parametrize(
    ("nets", "call", "message"),
    [
        (1, {}, r"control_image is missing: 1 ControlNet\(s\) are loaded"),
        (1, {"control_image": IMAGES}, "control_image: 3 given for 1 prompts"),
        (1, {"control_image": IMAGES[0], "control_scale": [1.0, 0.5]}, "control_scale: 2 given for 1 ControlNets"),
        (1, {"control_image": IMAGES[0], "control_scale": "strong"}, "control_scale is not a number"),
        (1, {"control_image": IMAGES[0], "control_scale": float("inf")}, "control_scale holds values that are not"),
        (2, {"control_image": IMAGES[:1]}, "control_image: 1 given for 2 ControlNets"),
        (2, {"control_image": Image.new("RGB", (SIDE, SIDE))}, "control_image: 1 given for 2 ControlNets"),
        (2, {"control_image": IMAGES[:2], "control_scale": [1.0] * 3}, "control_scale: 3 given for 2 ControlNets"),
    ],
)
def test_bad_controls_are_named(pipe: Pipeline, folder: Path, nets: int, call: dict[str, Any], message: str) -> None:
    for name in ("control-a", "control-b")[:nets]:
        pipe.load_controlnet(folder / name)
    with pytest.raises(UserError, match=message):
        pipe(PROMPT, **{**CALL, **call})


@pytest.mark.parametrize("call", [{}, {"image": IMAGES[0]}])
def test_an_inpainting_model_needs_a_mask(inpainter: Pipeline, call: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="this is an inpainting model; image and mask must be given"):
        inpainter(PROMPT, **CALL, **call)


# MARK: what they do


def test_the_size_is_that_of_the_image(pipe: Pipeline) -> None:
    """Rounded down to whole latent pixels, where no other is asked for."""
    image = Image.new("RGB", (21, 24))
    for given in (image, [image, IMAGES[0]], np.zeros((25, 20, 3)), [[image] * 2] * 2):
        assert image_inputs.image_size("control_image", given, 2) == (24, 20)
    assert pipe(PROMPT, **CALL, image=image, strength=0.5, width=16).shape == (1, 12, 8, 4)


def test_what_is_kept_is_the_image(pipe: Pipeline) -> None:
    """White is painted: there the seed matters. Black keeps the latents of the image."""
    clean = pipe.encode_images(IMAGES[:1])
    call = {**CALL, "image": IMAGES[0], "mask": MASK}
    first, second = pipe(PROMPT, **call), pipe(PROMPT, **call, seed=1)
    painted = (slice(None), slice(None), slice(SIDE // 4))
    kept = (slice(None), slice(None), slice(SIDE // 4, None))
    np.testing.assert_allclose(first[kept], clean[kept], rtol=0, atol=1e-6)
    assert np.abs(first[painted] - second[painted]).min(axis=(1, 2)).max() > 1e-3


def test_strength_by_default(pipe: Pipeline) -> None:
    """0.8 of the steps from an image, all with a mask, which the callback tells; 0.7 of 10 steps are 7."""
    for call, steps in (({}, 8), ({"mask": MASK}, 10), ({"strength": 0.7}, 7)):
        seen: list[tuple[int, int]] = []
        call = {**CALL, "steps": 10, "image": IMAGES[0], "stepwise": True, **call}
        pipe(PROMPT, callback=lambda step, total, seen=seen: seen.append((step, total)), **call)
        assert seen == [(i + 1, steps) for i in range(steps)]


def test_an_image_depends_on_its_own_inputs_alone(pipe: Pipeline, folder: Path) -> None:
    """Rounds of another size, and other prompts and images of the call, change nothing."""
    pipe.load_controlnet(folder / "control-a")
    masks = np.stack([MASK, MASK.T, MASK])
    call = {**CALL, "num_images": 2, "seed": 5, "strength": 0.5, "sampler": "tcd", "eta": 0.3}
    together = pipe(PROMPTS, image=IMAGES, mask=masks, control_image=IMAGES[::-1], **call)
    rounds = pipe(PROMPTS, image=IMAGES, mask=masks, control_image=IMAGES[::-1], batch_size=4, **call)
    assert difference(rounds, together) < SAME
    alone = pipe(PROMPT, image=IMAGES[0], mask=MASK, control_image=IMAGES[2], **call)
    assert difference(alone, together[:2]) < SAME
    other = pipe(PROMPT, image=IMAGES[0], mask=MASK, control_image=IMAGES[1], **call)
    assert difference(other, alone) > ANOTHER


def test_what_compiles_nothing(pipe: Pipeline, folder: Path, compilations: Compilations) -> None:
    """Another prompt, seed, image, mask, strength of as many steps, ControlNet image and scale."""
    pipe.load_controlnet(folder / "control-a")
    call = {**CALL, "guidance": 3.0, "image": IMAGES[0], "mask": MASK, "control_image": IMAGES[1], "strength": 0.5}
    first = pipe(PROMPT, **call)
    before = compilations.count
    for change in (
        {"seed": 3},
        {"image": IMAGES[2]},
        {"image": Image.new("RGB", (SIDE, SIDE))},
        {"mask": MASK.T},
        {"strength": 0.7},
        {"control_image": IMAGES[0]},
        {"control_scale": 0.5},
    ):
        assert difference(pipe("a cat face", **{**call, **change}), first) > ANOTHER
    assert compilations.count == before


def test_an_image_for_all_prompts_is_encoded_once(inpainter: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here twice: the image, and what the mask leaves of it."""
    programs, seen = inpainter._programs, []
    encode = lambda *inputs, **how: seen.append(how) or programs.encode_images(*inputs, **how)  # noqa: E731
    monkeypatch.setattr(inpainter, "_programs", dataclasses.replace(programs, encode_images=encode))
    inpainter([PROMPT] * 2, **CALL, image=IMAGES[0], mask=MASK)
    assert len(seen) == 2


def test_an_inpainting_model_reads_image_and_mask(inpainter: Pipeline) -> None:
    call = {**CALL, "image": IMAGES[0], "mask": MASK}
    first = inpainter(PROMPT, **call)
    painted = IMAGES[0].copy()
    painted[:, : SIDE // 2] = 0.5  # what is repainted is not looked at
    np.testing.assert_array_equal(inpainter(PROMPT, **{**call, "image": painted}), first)
    assert difference(inpainter(PROMPT, **{**call, "image": IMAGES[1]}), first) > ANOTHER
    assert difference(inpainter(PROMPT, **{**call, "mask": MASK.T}), first) > ANOTHER


def test_tiled(pipe: Pipeline) -> None:
    """The same where one tile holds the image, and near it where not: the norms see a tile each."""
    call = {**CALL, "output": "np"}
    np.testing.assert_array_equal(pipe(PROMPT, **call, tiled=True), pipe(PROMPT, **call))
    whole, tiled = (pipe(PROMPT, **call, height=8, width=160, tiled=tiled) for tiled in (False, True))
    assert whole.shape == (1, 8, 160, 3)
    difference = np.abs(tiled - whole).max()
    assert 0 < difference < 0.2 * np.ptp(whole)


def test_tiled_images(pipe: Pipeline) -> None:
    """Encoded in tiles too: black keeps what they are read as."""
    wide = RANDOM.random((8, 160, 3)).astype(np.float32)
    call = {**CALL, "image": wide, "mask": np.zeros((8, 160))}
    whole, tiled = (pipe(PROMPT, **call, tiled=tiled) for tiled in (False, True))
    np.testing.assert_allclose(tiled, pipe.encode_images(wide[None], tiled=True), rtol=0, atol=1e-6)
    assert 0 < np.abs(tiled - whole).max() < 0.2 * np.ptp(whole)


def test_on_a_mesh(pipe: Pipeline, folder: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    on_mesh = Pipeline.from_pretrained(folder / "model", mesh=mesh)
    call = {**CALL, "image": IMAGES[0], "mask": MASK, "control_image": IMAGES[1]}
    for each in (pipe, on_mesh):
        each.load_controlnet(folder / "control-a")
    assert difference(on_mesh(PROMPT, **call), pipe(PROMPT, **call)) < SAME


# MARK: other parts


def test_another_autoencoder(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder / "model")
    latents, before = pipe(PROMPT, **CALL), pipe(PROMPT, **{**CALL, "output": "np"})
    pipe.load_vae(folder / "taesd")
    np.testing.assert_array_equal(pipe(PROMPT, **CALL), latents)
    after = pipe(PROMPT, **{**CALL, "output": "np"})
    assert after.shape == before.shape
    assert np.abs(after - before).max() > 0.05
    assert pipe.base.params["vae"].keys() == pipe.base.components.vae.shapes.keys()
    params = tiny_vae(TinyVaeConfig.from_dict(TINY_VAE)).init(0)
    np.testing.assert_array_equal(pipe._programs.decode(params, latents, tiled=False), after)
    encoded, _ = pipe.base.components.vae(params, 2 * IMAGES[:1] - 1, method="encode")
    np.testing.assert_allclose(pipe.encode_images(IMAGES[:1]), encoded, rtol=0, atol=1e-5)
    pipe.load_vae(folder / "model" / "vae")
    np.testing.assert_array_equal(pipe(PROMPT, **{**CALL, "output": "np"}), before)


def test_autoencoders_one_after_another(folder: Path) -> None:
    """A file is read as the model's own, whatever was loaded before, and what is replaced is freed."""
    pipe = Pipeline.from_pretrained(folder / "model")
    call = {**CALL, "output": "np", "image": IMAGES[0], "strength": 0.5}
    before = pipe(PROMPT, **call)
    for source in (folder / "taesd", folder / "model" / "vae" / "diffusion_pytorch_model.safetensors"):
        own = [weakref.ref(leaf) for leaf in pipe.base.params["vae"].values()]
        pipe.load_vae(source)
        after = pipe(PROMPT, **call)
        gc.collect()
        assert not [leaf for leaf in own if leaf() is not None]
    np.testing.assert_array_equal(after, before)


def test_an_autoencoder_that_does_not_fit_changes_nothing(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    wide = {**VAE, "latent_channels": 8}
    save_params(tmp_path / "wide", vae(VaeConfig.from_dict(wide)).init(0), config=wide, component_kind="vae")
    deep = {**TINY_VAE, "num_encoder_blocks": [1, 1, 1], "num_decoder_blocks": [1, 1, 1]}
    deep |= {"encoder_block_out_channels": [8] * 3, "decoder_block_out_channels": [8] * 3}
    save_params(tmp_path / "deep", tiny_vae(TinyVaeConfig.from_dict(deep)).init(0), config=deep, component_kind="vae")
    pipe.load_controlnet(folder / "control-a")
    own = pipe.base.components
    with pytest.raises(UserError, match="latent_channels=8, but the model has 4"):
        pipe.load_vae(tmp_path / "wide")
    with pytest.raises(UserError, match="conditioning_embedding_out_channels makes 2, but the model has 4"):
        pipe.load_vae(tmp_path / "deep")
    assert pipe.base.components is own


def test_controlnets_come_and_go(pipe: Pipeline, folder: Path) -> None:
    base = pipe(PROMPT, **CALL)
    pipe.load_controlnet(folder / "control-a", name="edges")
    steered = pipe(PROMPT, **CALL, control_image=IMAGES[0])
    assert difference(steered, base) > ANOTHER
    assert difference(pipe(PROMPT, **CALL, control_image=IMAGES[0], control_scale=0.0), base) < SAME
    pipe.load_controlnet(folder / "control-b", name="edges")
    replaced = pipe(PROMPT, **CALL, control_image=IMAGES[0])
    assert difference(replaced, steered) > ANOTHER
    pipe.load_controlnet(folder / "control-a", name="depth")
    call = {**CALL, "control_image": [IMAGES[0], IMAGES[1]]}
    assert difference(pipe(PROMPT, **call, control_scale=[1.0, 0.0]), replaced) < SAME
    with pytest.raises(UserError, match="no ControlNet named 'edge' is loaded; did you mean edges"):
        pipe.unload_controlnet("edge")
    pipe.unload_controlnet("depth")
    np.testing.assert_array_equal(pipe(PROMPT, **CALL, control_image=IMAGES[0]), replaced)
    pipe.unload_controlnet()
    np.testing.assert_array_equal(pipe(PROMPT, **CALL), base)


@pytest.mark.parametrize(("key", "value"), [("cross_attention_dim", 24), ("conditioning_channels", 1)])
def test_a_controlnet_that_does_not_fit(pipe: Pipeline, tmp_path: Path, key: str, value: int) -> None:
    config = {**CONTROL, key: value}
    network = controlnet(ControlNetConfig.from_dict(config))
    save_params(tmp_path, network.init(0), config=config, component_kind="unet")
    with pytest.raises(UserError, match=key):
        pipe.load_controlnet(tmp_path)
    pipe(PROMPT, **CALL)  # and none is loaded


# MARK: LoRAs


def test_the_scale_of_a_lora_of_differences_compiles_nothing(
    pipe: Pipeline, tmp_path: Path, compilations: Compilations
) -> None:
    module = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    shape = pipe.base.components.unet.shapes[f"{module}.kernel"].shape[::-1]
    tensors, _ = random_kind("LoHa", shape, 0)
    name = "lora_unet_" + module.replace(".", "_")
    save_file({f"{name}.{suffix}": value for suffix, value in tensors.items()}, tmp_path / "loha.safetensors")
    base = pipe(PROMPT, **CALL)
    pipe.load_lora(tmp_path / "loha.safetensors")
    whole = pipe(PROMPT, **CALL)
    before = compilations.count
    pipe.set_lora_scale("loha", 0.25)
    part = pipe(PROMPT, **CALL)
    assert compilations.count == before
    changes = [np.abs(other - base).max() for other in (part, whole)]
    assert 0 < changes[0] < changes[1]
    pipe.set_lora_scale("loha", 0.0)
    assert difference(pipe(PROMPT, **CALL), base) < SAME


def test_a_released_file_brings_its_settings(pipe: Pipeline, tmp_path: Path) -> None:
    adapter = {"unet": random_adapter(pipe.base.shapes["unet"], 0)}
    file = tmp_path / "Hyper-SD15-8steps-lora.safetensors"
    write_lora(file, adapter, layout="kohya")
    pipe.load_lora(file)
    plan = pipe.settings()
    assert (plan.sampler, plan.steps, plan.guidance, plan.spacing) == ("ddim", 8, 0.0, "trailing")
    assert pipe.settings(steps=2).steps == 2
    assert pipe.settings("hyper-sd15-1step").sampler == "tcd"
    settings = {"steps": json.dumps(4), "sampler": "tcd", "eta": "0.3"}
    write_lora(file, adapter, layout="kohya", metadata=settings)  # what the file says itself wins
    pipe.load_lora(file)
    plan = pipe.settings()
    assert (plan.sampler, plan.steps, plan.eta, plan.guidance) == ("tcd", 4, 0.3, 0.0)


# MARK: long prompts


def test_long_prompts_leave_the_others_alone(pipe: Pipeline) -> None:
    """Each prompt is read in as many windows as it and its negative fill, whatever stands beside it."""
    long = "apple " * 30
    call = {**CALL, "guidance": 3.0, "long_prompts": "chunk"}
    texts, negatives = [long, PROMPT, PROMPT], [None, "blob", long]
    together = pipe(texts, negatives, **call)
    in_rounds = pipe(texts, negatives, **call, batch_size=2)
    assert difference(in_rounds, together) < SAME
    cut = pipe([PROMPT, PROMPT], [None, "blob"], **{**call, "long_prompts": "cut"})
    assert difference(together[1], cut[1]) < SAME
    with pytest.warns(UserWarning, match="the prompt is longer than"):
        cut = pipe(texts[0], **{**call, "long_prompts": "cut"})
    assert difference(together[:1], cut) > ANOTHER
