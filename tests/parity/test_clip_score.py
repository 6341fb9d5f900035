"""A whole CLIP against transformers, through a folder that it wrote: embeddings, logits, gradients, images."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hypersd_jax.rewards import ImageSteps, clip_scores, load_clip, preprocess
from hypersd_jax.rewards.clip_score import embed_images, embed_texts
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.tensors import open_tensors, save_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.helpers.quick import quick_jit
from tests.helpers.torch_weights import perturb, relative_error

PROMPTS = ["red apple", "blue cat on a green field, fluent flat style", ""]
LAYERS = {"intermediate_size": 33, "num_hidden_layers": 2}
FAMILIES = {
    "openai": {"hidden_act": "quick_gelu"},
    "openclip": {"hidden_act": "gelu"},
}


def _random_image(height, width, seed=0):
    """Colours, edges and noise, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, 120.0 * ((x // 6 + y // 9) % 2) + 60], axis=-1)
    return np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8)


IMAGES = np.stack([_random_image(40, 55, seed) for seed in range(3)])


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """transformers' model, tokenizer and image processor, and the folder that they wrote."""
    folder = tmp_path_factory.mktemp("clip") / request.param
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(assets() / "teacher" / "tokenizer"))
    text = {"vocab_size": 2274, "hidden_size": 24, "num_attention_heads": 3, "max_position_embeddings": 24}
    ids = {"bos_token_id": 2272, "eos_token_id": 2273 if request.param == "openai" else 2, "pad_token_id": 2273}
    vision = {"hidden_size": 30, "num_attention_heads": 5, "image_size": 21, "patch_size": 7}
    config = transformers.CLIPConfig(
        text_config={**text, **ids, **LAYERS, **FAMILIES[request.param]},
        vision_config={**vision, **LAYERS, **FAMILIES[request.param]},
        projection_dim=18,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    for seed, tower in enumerate((model.text_model, model.vision_model)):
        perturb(tower, seed)
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 21}, crop_size={"height": 21, "width": 21})
    transformers.CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return model, tokenizer, processor, folder


def test_embeddings_logits_and_gradients(pair):
    """On the very pixels that we prepare, so that only the networks are compared."""
    model, tokenizer, _, folder = pair
    score = load_clip(folder)
    images = jnp.asarray(IMAGES)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=24, return_tensors="pt")["input_ids"]
    np.testing.assert_array_equal(score.tokenize(PROMPTS), ids)
    pixels = preprocess(images, score.model.steps)
    nchw = torch.tensor(np.asarray(pixels).transpose(0, 3, 1, 2), requires_grad=True)
    theirs = model(input_ids=ids, pixel_values=nchw)

    cosines = (theirs.image_embeds * theirs.text_embeds).sum(-1)
    (100 * cosines.sum()).backward()
    wanted = np.asarray(nchw.grad).transpose(0, 2, 3, 1)

    @quick_jit
    def ours(params, images, ids, wanted):
        seen, read = embed_images(score.model, params, images), embed_texts(score.model, params, ids)
        logits = jnp.exp(params["logit_scale"]) * jnp.matmul(seen, read.T, precision="highest")
        floats = images.astype(jnp.float32) / 255
        gradient = jax.grad(lambda x: jnp.sum(clip_scores(score.model, params, x, ids)))(floats)
        # Back through the same preparation of images.
        _, back = jax.vjp(lambda x: preprocess(x, score.model.steps), floats)
        return seen, read, logits, clip_scores(score.model, params, images, ids), gradient, back(wanted)[0]

    seen, read, logits, scores, gradient, wanted = ours(score.params, images, jnp.asarray(ids), wanted)
    assert relative_error(seen, theirs.image_embeds) < 1e-5
    assert relative_error(read, theirs.text_embeds) < 1e-5
    assert relative_error(logits, theirs.logits_per_image) < 1e-5
    np.testing.assert_allclose(scores, 100 * cosines.detach().numpy(), atol=2e-4)
    assert relative_error(gradient, wanted) < 1e-4


def test_scores_of_bytes_as_the_processor_prepares_them(pair):
    """What rounding to 8 bits between the passes of resizing changes in a score of 100 at most."""
    model, tokenizer, processor, folder = pair
    pixels = processor([Image.fromarray(image) for image in IMAGES], return_tensors="pt")["pixel_values"]
    ids = tokenizer(PROMPTS, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = model(input_ids=ids, pixel_values=pixels)
    wanted = 100 * (theirs.image_embeds * theirs.text_embeds).sum(-1)
    np.testing.assert_allclose(load_clip(folder)(IMAGES, PROMPTS), wanted, atol=0.05)


def test_a_folder_of_before_4_31_and_one_file(pair, tmp_path):
    """The buffers that were stored then, and a model without its folder's other files."""
    _, _, _, folder = pair
    wanted = load_clip(folder)(IMAGES, PROMPTS)
    with open_tensors(folder / "model.safetensors") as file:
        tensors = {key: file.read(key) for key in file.keys()}  # noqa: SIM118
    tensors["text_model.embeddings.position_ids"] = np.arange(24)[None]
    tensors["vision_model.embeddings.position_ids"] = np.arange(10)[None]
    save_tensors(tmp_path / "old.safetensors", tensors, {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    np.testing.assert_array_equal(load_clip(tmp_path / "old.safetensors")(IMAGES, PROMPTS), wanted)


def test_configurations_are_read_as_transformers_reads_them(tmp_path):
    """Whatever the towers' parts say of the joint space, and where things are said twice."""
    from hypersd_jax.weights.diffusers.clip import read_configs

    stated = {
        "model_type": "clip",
        "projection_dim": 9,
        "text_config": {"hidden_size": 24, "num_attention_heads": 2, "projection_dim": 512, "eos_token_id": 2},
        "text_config_dict": {"hidden_size": 32, "num_attention_heads": 4},
        "vision_config": {"hidden_size": 24, "num_attention_heads": 3, "projection_dim": 768, "image_size": 64},
        "vision_config_dict": None,
    }
    theirs = transformers.CLIPConfig.from_dict(json.loads(json.dumps(stated)))
    text, vision = read_configs(stated)
    for ours, part in ((text, theirs.text_config), (vision, theirs.vision_config)):
        for name in set(ours.__dataclass_fields__) - {"projection_dim"}:
            assert getattr(ours, name) == getattr(part, name), name
        assert ours.projection_dim == theirs.projection_dim


@pytest.mark.parametrize("shape", [(64, 64), (45, 80), (83, 37), (9, 11)])
def test_images_as_pytorch_resizes_them(shape):
    image = _random_image(*shape)
    size = [int(24 * side / min(shape)) for side in shape]
    nchw = torch.tensor(image.transpose(2, 0, 1)[None] / np.float32(255))
    theirs = torch.nn.functional.interpolate(nchw, size, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((side - 24) // 2 for side in size)
    theirs = theirs[0, :, top : top + 24, left : left + 24].permute(1, 2, 0)
    plain = ImageSteps(size=24, mean=(0.0,) * 3, std=(1.0,) * 3)
    np.testing.assert_allclose(preprocess(jnp.asarray(image)[None], plain)[0], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(300, 300), (250, 417), (480, 226)])
def test_images_as_the_processor_prepares_them(shape):
    """The same crop and normalisation; 8-bit rounding apart, which a shift by one pixel would exceed by far."""
    image = _random_image(*shape)
    theirs = CLIPImageProcessorPil()(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = np.asarray(preprocess(jnp.asarray(image)[None], ImageSteps())[0])
    apart = np.abs(ours - theirs) * np.asarray(ImageSteps().std)
    assert np.quantile(apart, 0.99) < 1.1 / 255
    assert apart.max() < 4 / 255
