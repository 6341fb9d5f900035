"""Text to image: the object that users hold, and what it compiles."""

from hypersd_jax.pipeline.arguments import parse_dtype as parse_dtype
from hypersd_jax.pipeline.arguments import to_pil as to_pil
from hypersd_jax.pipeline.model import Generated as Generated
from hypersd_jax.pipeline.model import Pipeline as Pipeline
from hypersd_jax.pipeline.settings import CallSettings as CallSettings
from hypersd_jax.pipeline.settings import Settings as Settings
