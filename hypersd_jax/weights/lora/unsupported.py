"""Kinds of LoRA that are known by their keys and not read here, so that they can be refused by name."""

from __future__ import annotations

import re

_KINDS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.set_weight$", "replaced weight (set_weight)"),
        (r"\.(oft_|boft_)", "OFT"),
        (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "GLoRA"),
        (r"\.on_input$", "IA3"),
        (r"\.lora_embedding_[AB]$", "embedding LoRA"),
        (r"\.lora_[AB]\.bias$|\.lora_(down|up)\.bias$|\.lora_bias$", "LoRA with biases"),
        (
            r"^(lora_transformer[._]|lora_te3[._]|transformer\.|t5[a-z]*\."
            r"|diffusion_model\.(?!input_|middle_|output_|time_|label_|out\.)"
            r"|lora_unet_(double|single|joint)_(transformer_)?blocks_|lora_unet_(transformer_blocks|blocks|layers)_)",
            "a transformer model's LoRA (FLUX, SD3)",
        ),
        (r"^lora_prior", "Stable Cascade LoRA"),
        (r"^(unet|text_encoder):\d+:(up|down)$", "numbered LoRA (the first trainers' layout)"),
    )
)


def unsupported(key: str) -> str | None:
    """The kind of LoRA that a key is of, where that kind is not read; None for all other keys."""
    return next((kind for pattern, kind in _KINDS if pattern.search(key)), None)
