"""LoRA files: read in every layout in use, written in three, converted, merged and extracted."""

from hypersd_jax.weights.lora.file import LAYOUTS as LAYOUTS
from hypersd_jax.weights.lora.file import LoraFile as LoraFile
from hypersd_jax.weights.lora.file import LoraReport as LoraReport
from hypersd_jax.weights.lora.file import read_lora as read_lora
from hypersd_jax.weights.lora.file import weights_file as weights_file
from hypersd_jax.weights.lora.file import write_lora as write_lora
