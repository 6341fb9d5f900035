"""The object that users hold, and what it compiles."""

from hypersd_jax.pipeline.arguments import parse_dtype as parse_dtype
from hypersd_jax.pipeline.arguments import to_pil as to_pil
from hypersd_jax.pipeline.model import Pipeline as Pipeline
from hypersd_jax.pipeline.prompting import make_prompt_encoder as make_prompt_encoder
