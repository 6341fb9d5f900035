"""Shared by both sides of `benchmarks/feedback_step.py`: settings, file names, and the reward's size."""

from __future__ import annotations

from typing import Any

TIME, RANK, FEEDBACK_RANK, LEARNING_RATE, CLIP_NORM, MARGIN = 999, 64, 32, 1e-5, 1.0, 1.0
"""One step from the noise; a margin above what random weights score, so that every image has a gradient."""

STAGE: dict[str, Any] = {
    "name": "timed",
    "kind": "feedback",
    "updates": 1000,
    "batch_size": 1,
    "learning_rate": LEARNING_RATE,
    "clip_norm": CLIP_NORM,
    "weight_decay": 0.0,
    "ema": 0.0,
    "times": [TIME],
    "rank": FEEDBACK_RANK,
    "guidance": 1.0,
    "anchor": None,
}
REWARD = {"name": "aesthetic", "margin": MARGIN}
GIVEN, DISTILLED, SECOND = "given.npz", "distilled.safetensors", "second.safetensors"
L14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
"""ViT-L/14, whose weights are random here."""
