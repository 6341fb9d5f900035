"""PyTorch's side: ``python -m benchmarks.sides.rewards_theirs NAME MODEL FOLDER``; it writes the random weights too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from benchmarks.sides import parity, rewards, rewards_torch
from hypersd_jax.weights.tokenizers import clip_tokenizer

L14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
H14 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
H14_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
OPEN_H14 = {
    "embed_dim": 1024,
    "vision_cfg": {
        "width": 1280,
        "layers": 32,
        "head_width": 80,
        "mlp_ratio": 4.0,
        "patch_size": 14,
        "image_size": 224,
    },
    "text_cfg": {"width": 1024, "layers": 24, "heads": 16, "context_length": 77, "vocab_size": 49408},
}

Score = Callable[[torch.Tensor], torch.Tensor]


def clip_ids(model: Path, pad: str) -> torch.Tensor:
    """Token ids by CLIP's tokenizer, filled up with one mark or another."""
    clip_tokenizer(pad).write(model / "tokenizer")
    read = transformers.CLIPTokenizer.from_pretrained(str(model / "tokenizer"))
    found = read(rewards.PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
    return found["input_ids"]


def aesthetic(model: Path) -> Score:
    config = transformers.CLIPConfig(
        text_config={"num_hidden_layers": 1, "hidden_act": "quick_gelu"},  # which the reward does not read
        vision_config={**L14, "patch_size": 14, "image_size": 224, "hidden_act": "quick_gelu"},
        projection_dim=768,
    )
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(model)
    head = rewards_torch.aesthetic_head("linear", 768)
    save_file(head.state_dict(), model / "aesthetic_head.safetensors")
    return lambda images: rewards_torch.aesthetic_score(clip, head, images)


def pickscore(model: Path) -> Score:
    config = transformers.CLIPConfig(
        text_config={**H14_TEXT, "hidden_act": "gelu", "eos_token_id": 49407},
        vision_config={**H14, "patch_size": 14, "image_size": 224, "hidden_act": "gelu"},
        projection_dim=1024,
        logit_scale_init_value=4.6052,
    )
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(model)
    ids = clip_ids(model, "<|endoftext|>")
    return lambda images: rewards_torch.pick_score(clip, images, ids)


def hpsv2(model: Path) -> Score:
    clip = rewards_torch.OpenClip(OPEN_H14).eval()
    save_file(clip.state_dict(), model / "HPS_v2.1_compressed.safetensors")
    ids = clip_ids(model, "!")  # token 0, with which OpenCLIP fills prompts up
    return lambda images: rewards_torch.hps_score(clip, images, ids, 224)


def imagereward(model: Path) -> Score:
    reward = rewards_torch.ImageReward()
    save_file(reward.state_dict(), model / "model.safetensors")
    (model / "vocab.txt").write_text(rewards.vocabulary(), encoding="utf-8")
    read = transformers.BertTokenizer.from_pretrained(str(model))
    found = read(rewards.PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return lambda images: reward(images, found["input_ids"], found["attention_mask"])


SCORES = {"aesthetic": aesthetic, "pickscore": pickscore, "hpsv2": hpsv2, "imagereward": imagereward}


def main() -> None:
    name, model, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    record = parity.Record("theirs", folder)
    model.mkdir(parents=True)
    with record.part("weights"):
        score = {"aesthetic": aesthetic, "pickscore": pickscore, "hpsv2": hpsv2, "imagereward": imagereward}[name](
            model
        )
    images = torch.tensor(rewards.photos() / 255, dtype=torch.float32, requires_grad=True)
    with record.part("score and gradient"):
        scores = score(images)
        (scores * torch.tensor(rewards.WEIGHTS)).sum().backward()
    record.keep("score", scores.detach())
    record.keep("score: d image", images.grad)
    record.write()


if __name__ == "__main__":
    main()
