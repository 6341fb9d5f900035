"""Rewards in plain PyTorch, differentiable from the image on: what `hypersd_jax.rewards` is compared with.

Modules bear the names of the files that their authors published. Images are (B, H, W, 3) in 0..1.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

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


class BlipBlock(nn.Module):
    """A layer of BLIP's image encoder, timm's."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, inner), act=nn.GELU(), fc2=nn.Linear(inner, width)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class BlipVision(nn.Module):
    """BLIP's image encoder, timm's ViT."""

    def __init__(self, width: int, inner: int, layers: int, image_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList([BlipBlock(width, width // 64, inner) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ImageReward(nn.Module):
    """ImageReward: the image encoder above, transformers' port of BLIP's text encoder, the head."""

    def __init__(
        self,
        vocabulary: int = 30524,
        vision: dict[str, int] | None = None,
        text: dict[str, int] | None = None,
        widths: tuple[int, ...] = (1024, 128, 64, 16),
    ) -> None:
        super().__init__()
        vision = vision or {"width": 1024, "inner": 4096, "layers": 24, "image_size": 224, "patch_size": 16}
        text = text or {"width": 768, "inner": 3072, "layers": 12}
        config = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text["width"],
            encoder_hidden_size=vision["width"],
            intermediate_size=text["inner"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["width"] // 64,
            is_decoder=True,  # which gives the layers their cross-attention
            attn_implementation="eager",
        )
        self.size = vision["image_size"]
        encoders = {
            "visual_encoder": BlipVision(**vision),
            "text_encoder": BlipTextModel(config, add_pooling_layer=False),
        }
        self.blip = nn.ModuleDict(encoders)
        self.mlp = aesthetic_head("linear", text["width"], widths)
        self.eval()

    def forward(self, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = self.blip["visual_encoder"](prepare(images, self.size, "torchvision"))
        state = self.blip["text_encoder"](
            ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            is_decoder=False,
        ).last_hidden_state[:, 0]
        return (self.mlp(state)[:, 0] - 0.16717362830052426) / 1.0333394966054072
