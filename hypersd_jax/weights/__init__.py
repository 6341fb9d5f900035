"""Weights on disk: safetensors files, diffusers component folders, names and layouts."""

from hypersd_jax.weights.convert_model import convert_model as convert_model
from hypersd_jax.weights.diffusers.component import component_files as component_files
from hypersd_jax.weights.diffusers.component import fingerprint as fingerprint
from hypersd_jax.weights.diffusers.component import load_params as load_params
from hypersd_jax.weights.diffusers.component import read_json as read_json
from hypersd_jax.weights.diffusers.component import save_params as save_params
from hypersd_jax.weights.lora import LoraFile as LoraFile
from hypersd_jax.weights.lora import LoraReport as LoraReport
from hypersd_jax.weights.lora import read_lora as read_lora
from hypersd_jax.weights.lora import write_lora as write_lora
from hypersd_jax.weights.lora.convert import convert_lora as convert_lora
from hypersd_jax.weights.lora.extract import extract_lora as extract_lora
from hypersd_jax.weights.lora.merge import merge_loras as merge_loras
from hypersd_jax.weights.tensors import TensorFile as TensorFile
from hypersd_jax.weights.tensors import open_tensors as open_tensors
from hypersd_jax.weights.tensors import save_tensors as save_tensors
