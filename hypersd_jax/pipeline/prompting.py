"""A model's prompts as what its UNet is conditioned on."""

from __future__ import annotations

from hypersd_jax.conditioning import PromptEncoder, load_tokenizer
from hypersd_jax.weights.components import Components


def make_prompt_encoder(components: Components) -> PromptEncoder:
    """The prompt encoder of loaded components."""
    names = tuple(components.text_encoders)
    roles = [name.replace("text_encoder", "tokenizer") for name in names]
    return PromptEncoder(
        names=names,
        tokenizers=tuple(load_tokenizer(components.description.tokenizers[role]) for role in roles),
        networks=tuple(components.text_encoders.values()),
        lengths=tuple(components.text_lengths[name] for name in names),
        penultimate=components.is_xl,
    )
