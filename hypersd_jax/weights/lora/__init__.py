"""LoRA files: read in every layout in use, written in three, converted, merged and extracted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypersd_jax.lazy import lazily

if TYPE_CHECKING:
    from hypersd_jax.weights.lora.file import LoraFile as LoraFile
    from hypersd_jax.weights.lora.file import LoraReport as LoraReport
    from hypersd_jax.weights.lora.file import read_lora as read_lora
    from hypersd_jax.weights.lora.file import weights_file as weights_file
    from hypersd_jax.weights.lora.file import write_lora as write_lora

__getattr__ = lazily(
    __name__, dict.fromkeys(("LoraFile", "LoraReport", "read_lora", "weights_file", "write_lora"), "file")
)
