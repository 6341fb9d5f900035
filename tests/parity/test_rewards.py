"""Rewards from folders and files as their authors publish them, against PyTorch: scores, and gradients to the pixels.

Both sides start from the same floats, so that the preprocessing of images is compared too. Scores agree to 1e-5 of
their size, gradients to 1e-4 in the relative L2 norm.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypersd_jax as hs
from hypersd_jax.rewards.preprocess import ImageSteps, crop, pad, preprocess, torchvision_crop
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.keys import torch_key
from hypersd_jax.weights.tensors import save_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from benchmarks.sides import rewards_torch
from tests.helpers.torch_weights import perturb, relative_error

PROMPTS = ["red apple", "blue cat on a green field, fluent flat style"]
IMAGES = np.random.default_rng(0).random((2, 26, 37, 3), dtype=np.float32)
FITS = {"transformers": crop, "torchvision": torchvision_crop, "pad": pad}
POSITIONS = "blip.text_encoder.embeddings.position_ids"
SIZE, PATCH, JOINT = 15, 5, 10
VISION = {"width": 24, "layers": 2, "head_width": 8, "mlp_ratio": 1.5, "patch_size": PATCH, "image_size": SIZE}
TEXT = {"width": 16, "layers": 1, "heads": 2, "mlp_ratio": 2.0, "context_length": 24, "vocab_size": 2274}


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.CLIPTokenizer.from_pretrained(str(assets() / "teacher" / "tokenizer"))


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(PROMPTS, padding="max_length", max_length=24, return_tensors="pt")["input_ids"]


def perturbed(module):
    """All but the logarithm of a scale."""
    for seed, child in enumerate(module.children()):
        perturb(child, seed)
    return module.eval()


def clip(activation):
    """transformers' CLIP of the sizes above, random and nowhere symmetric."""
    layers = {"hidden_act": activation}
    text = {"vocab_size": 2274, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, **layers}
    vision = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, **layers}
    marks = {"bos_token_id": 2272, "eos_token_id": 2273, "pad_token_id": 2273}
    config = transformers.CLIPConfig(
        text_config={**text, "num_attention_heads": 2, "max_position_embeddings": 24, **marks},
        vision_config={**vision, "image_size": SIZE, "patch_size": PATCH},
        projection_dim=JOINT,
    )
    torch.manual_seed(0)
    return perturbed(transformers.CLIPModel(config))


def tensors(module):
    """A module's weights as they are converted from its file."""
    return {key: value.detach().numpy() for key, value in module.state_dict().items()}


def theirs(score):
    """Scores by a function of PyTorch, and the gradient of a weighted sum of them to the images."""
    images = torch.tensor(IMAGES, requires_grad=True)
    scores = score(images)
    (scores * torch.tensor([1.0, -2.0])).sum().backward()
    return scores.detach().numpy(), images.grad.numpy()


def compare(reward, score, prompts=PROMPTS):
    """Compare a reward with a function of PyTorch, called as users and as trainers call it."""
    wanted, gradient = theirs(score)
    np.testing.assert_allclose(reward(IMAGES, prompts), wanted, rtol=1e-5, atol=1e-5)

    def total(images):
        scores = reward(images, prompts)
        return jnp.sum(scores * jnp.asarray([1.0, -2.0])), scores

    (_, scores), found = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(IMAGES))
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)
    assert relative_error(found, gradient) < 1e-4
    assert np.abs(gradient).max() > 1e-4


@pytest.mark.parametrize("shape", [(64, 64), (45, 80), (83, 37), (9, 11), (24, 27)])
@pytest.mark.parametrize("fit", FITS)
def test_images_as_pytorch_prepares_them(shape, fit):
    images = np.random.default_rng(shape).random((1, *shape, 3), dtype=np.float32)
    wanted = rewards_torch.prepare(torch.tensor(images), 24, fit).permute(0, 2, 3, 1)
    found = preprocess(jnp.asarray(images), ImageSteps(size=24, fit=FITS[fit]))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def aesthetic_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aesthetic")
    model = clip("quick_gelu")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("kind", ["v1", "linear", "relu"])
def test_aesthetic(aesthetic_folder, kind):
    model, folder = aesthetic_folder
    torch.manual_seed(1)
    head = rewards_torch.aesthetic_head(kind, JOINT, widths=(9, 8, 7, 6))
    save_tensors(folder / f"{kind}.safetensors", tensors(head))
    reward = hs.rewards.load("aesthetic", folder / f"{kind}.safetensors")
    compare(reward, lambda images: rewards_torch.aesthetic_score(model, head, images))
    assert reward.model.layers == (5 if kind == "relu" else 1)


def test_pickscore(tmp_path, tokenizer, ids):
    model = clip("gelu")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    compare(hs.rewards.load("pickscore", tmp_path), lambda images: rewards_torch.pick_score(model, images, ids))


def test_hpsv2(tmp_path, tokenizer, ids):
    """OpenCLIP's layout: q, k and v in one tensor, projections transposed."""
    config = {"embed_dim": JOINT, "vision_cfg": VISION, "text_cfg": TEXT}
    torch.manual_seed(2)
    model = perturbed(rewards_torch.OpenClip(config))
    tokenizer.save_pretrained(tmp_path)
    save_tensors(tmp_path / "HPS_v2.1_compressed.safetensors", tensors(model))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    reward = hs.rewards.load("hpsv2", tmp_path / "HPS_v2.1_compressed.safetensors")
    compare(reward, lambda images: rewards_torch.hps_score(model, images, ids, SIZE))
    assert len(reward.params) == len(model.state_dict()) + 2 * 2 * (VISION["layers"] + TEXT["layers"])


def vocabulary(folder):
    """The words of the prompts and BERT's marks, in the order in which bert-base-uncased has those."""
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["red", "blue", "cat", "on", "a", "green", "field", ",", "flu", "##ent", "flat", "style", "app", "##le"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return len(words) + 2


def test_image_reward(tmp_path):
    """A prompt of 35 tokens and more, which is cut, and a short one."""
    torch.manual_seed(3)
    model = rewards_torch.ImageReward(
        vocabulary=vocabulary(tmp_path),
        vision={"width": 128, "inner": 40, "layers": 2, "image_size": 12, "patch_size": 4},
        text={"width": 128, "inner": 48, "layers": 2},
        widths=(9, 8, 7, 6),
    )
    perturbed(model)
    extras = {"blip.vision_proj.weight": np.zeros((4, 4), np.float32), POSITIONS: np.arange(512)[None]}
    stored = {**tensors(model), **extras}
    save_tensors(tmp_path / "model.safetensors", stored)
    reward = hs.rewards.load("imagereward", tmp_path)
    prompts = ["red apple", "blue cat on a green field, fluent flat style " * 5]
    tokenizer = transformers.BertTokenizer.from_pretrained(str(tmp_path))
    found = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    np.testing.assert_array_equal(reward.tokenize(prompts), found["input_ids"])
    assert found["attention_mask"].sum(1).tolist() == [5, 35]
    compare(reward, lambda images: model(images, found["input_ids"], found["attention_mask"]), prompts)
    head = {"head.0.kernel", "head.0.bias"}
    used = {f"blip.{torch_key(path)}" for path in reward.params.keys() - head}
    assert {key for key in stored if not key.startswith("mlp.")} - used == extras.keys()
