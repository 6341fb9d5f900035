"""Rewards in plain PyTorch, differentiable from the image on: what `hypersd_jax.rewards` is compared with.

Modules bear the names of the files that their authors published. Images are (B, H, W, 3) in 0..1.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import nn

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def prepare(images: torch.Tensor, size: int, fit: str) -> torch.Tensor:
    """Resize, crop or pad, and normalise to (B, 3, size, size), without a step through 8 bits.

    ``fit``: "transformers" and "torchvision" are their centre crops, "pad" is OpenCLIP's `ResizeMaxSize`.
    """
    x = images.permute(0, 3, 1, 2)
    height, width = x.shape[2:]
    if fit == "pad":
        scale = size / max(height, width)
        resized = [round(height * scale), round(width * scale)]
    else:
        resized = [int(size * side / min(height, width)) for side in (height, width)]
    if resized != [height, width]:
        x = nn.functional.interpolate(x, resized, mode="bicubic", antialias=True, align_corners=False)
    if fit == "pad":
        rows, columns = size - resized[0], size - resized[1]
        x = nn.functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    else:
        cut = (lambda margin: round(margin / 2)) if fit == "torchvision" else (lambda margin: margin // 2)
        top, left = (cut(side - size) for side in resized)
        x = x[:, :, top : top + size, left : left + size]
    mean, std = (torch.tensor(value).reshape(1, 3, 1, 1) for value in (MEAN, STD))
    return (x - mean) / std


def aesthetic_head(kind: str, width: int, widths: tuple[int, ...] = (1024, 128, 64, 16)) -> nn.Module:
    """LAION's heads: "v1", "linear" (v2) and "relu"; both of v2 are kept under ``layers.``."""
    if kind == "v1":
        return nn.Linear(width, 1)
    sizes, layers = [width, *widths, 1], []
    for index, (before, after) in enumerate(pairwise(sizes)):
        last = index == len(widths)
        layers.append(nn.Linear(before, after))
        if kind == "relu" and not last:
            layers.append(nn.ReLU())
        if index < 3:
            layers.append(nn.Dropout(0.1))
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*layers))).eval()


def aesthetic_score(clip: Any, head: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Scores (B,) by a `CLIPModel` of transformers."""
    pixels = prepare(images, clip.config.vision_config.image_size, "torchvision")
    seen = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    return head(seen / seen.norm(dim=-1, keepdim=True))[:, 0]


def pick_score(clip: Any, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """PickScore (B,) by a `CLIPModel` of transformers."""
    pixels = prepare(images, clip.config.vision_config.image_size, "transformers")
    found = clip(input_ids=ids, pixel_values=pixels)
    return clip.logit_scale.exp() * (found.image_embeds * found.text_embeds).sum(-1)


class Block(nn.Module):
    """A layer of OpenCLIP's."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, inner), gelu=nn.GELU(), c_proj=nn.Linear(inner, width))
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, int(width * ratio)) for _ in range(layers)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    """OpenCLIP's image tower."""

    def __init__(self, config: dict[str, Any], joint: int) -> None:
        super().__init__()
        width, patch = config["width"], config["patch_size"]
        tokens = (config["image_size"] // patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config["layers"], width // config["head_width"], config["mlp_ratio"])
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, joint) * width**-0.5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """OpenCLIP's `CLIP` of an `open_clip_config.json`'s `model_cfg`; the text tower pools at the highest id."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        text, joint = config["text_cfg"], config["embed_dim"]
        self.visual = Visual(config["vision_cfg"], joint)
        self.token_embedding = nn.Embedding(text["vocab_size"], text["width"])
        self.positional_embedding = nn.Parameter(torch.randn(text["context_length"], text["width"]) * 0.01)
        self.transformer = Transformer(text["width"], text["layers"], text["heads"], text.get("mlp_ratio", 4.0))
        self.ln_final = nn.LayerNorm(text["width"])
        self.text_projection = nn.Parameter(torch.randn(text["width"], joint) * text["width"] ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
        return self.ln_final(x)[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def hps_score(clip: OpenClip, images: torch.Tensor, ids: torch.Tensor, size: int) -> torch.Tensor:
    """HPSv2 (B,): the plain dot product of unit embeddings, of images padded to squares."""
    seen = nn.functional.normalize(clip.visual(prepare(images, size, "pad")), dim=-1)
    return (seen * nn.functional.normalize(clip.encode_text(ids), dim=-1)).sum(-1)
