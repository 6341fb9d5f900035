"""Weights on disk: safetensors files, diffusers component folders, names and layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypersd_jax.lazy import lazily

if TYPE_CHECKING:
    from hypersd_jax.weights.conversion import convert_model as convert_model
    from hypersd_jax.weights.diffusers.component import component_files as component_files
    from hypersd_jax.weights.diffusers.component import load_params as load_params
    from hypersd_jax.weights.diffusers.component import read_json as read_json
    from hypersd_jax.weights.diffusers.component import save_params as save_params
    from hypersd_jax.weights.fingerprints import fingerprint as fingerprint
    from hypersd_jax.weights.lora.convert import convert_lora as convert_lora
    from hypersd_jax.weights.lora.extract import extract_lora as extract_lora
    from hypersd_jax.weights.lora.file import LoraFile as LoraFile
    from hypersd_jax.weights.lora.file import LoraReport as LoraReport
    from hypersd_jax.weights.lora.file import read_lora as read_lora
    from hypersd_jax.weights.lora.file import write_lora as write_lora
    from hypersd_jax.weights.lora.merge import merge_loras as merge_loras
    from hypersd_jax.weights.tensors import TensorFile as TensorFile
    from hypersd_jax.weights.tensors import open_tensors as open_tensors
    from hypersd_jax.weights.tensors import save_tensors as save_tensors

__getattr__ = lazily(
    __name__,
    {
        "convert_lora": "lora.convert",
        "convert_model": "conversion",
        "extract_lora": "lora.extract",
        "merge_loras": "lora.merge",
        "fingerprint": "fingerprints",
        **dict.fromkeys(("component_files", "load_params", "read_json", "save_params"), "diffusers.component"),
        **dict.fromkeys(("LoraFile", "LoraReport", "read_lora", "write_lora"), "lora.file"),
        **dict.fromkeys(("TensorFile", "open_tensors", "save_tensors"), "tensors"),
    },
)
