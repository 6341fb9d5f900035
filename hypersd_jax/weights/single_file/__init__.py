"""Models in one .safetensors file, by the names of the original Stable Diffusion programs: read and written."""

from hypersd_jax.weights.single_file.model import load_single_file as load_single_file
from hypersd_jax.weights.single_file.model import open_single_file as open_single_file
from hypersd_jax.weights.single_file.model import save_single_file as save_single_file
from hypersd_jax.weights.single_file.model import write_single_file as write_single_file
