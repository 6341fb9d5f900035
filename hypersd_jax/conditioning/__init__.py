"""Prompts to conditioning: tokenizers, text embeddings, SDXL's size ids and the unconditional."""

from hypersd_jax.conditioning.long_prompts import CutCounter as CutCounter
from hypersd_jax.conditioning.long_prompts import LongPromptWarning as LongPromptWarning
from hypersd_jax.conditioning.long_prompts import already_warned as already_warned
from hypersd_jax.conditioning.long_prompts import warn_of_cuts as warn_of_cuts
from hypersd_jax.conditioning.prompts import Conditioning as Conditioning
from hypersd_jax.conditioning.prompts import PromptEncoder as PromptEncoder
from hypersd_jax.conditioning.prompts import load_tokenizer as load_tokenizer
from hypersd_jax.conditioning.prompts import size_ids as size_ids
