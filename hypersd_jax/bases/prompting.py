"""The prompt encoder of a loaded model."""

from __future__ import annotations

from typing import Any

from hypersd_jax.conditioning import PromptEncoder, load_tokenizer
from hypersd_jax.errors import UserError
from hypersd_jax.weights.components import Components

_EMBEDDING = "text_model.embeddings.token_embedding.embedding"


def make_prompt_encoder(components: Components) -> PromptEncoder:
    """Make the prompt encoder of loaded components: tokenizers, and text encoders that embed all their ids."""
    names = tuple(components.text_encoders)
    files = [components.description.tokenizers[name.replace("text_encoder", "tokenizer")] for name in names]
    tokenizers = tuple(map(load_tokenizer, files))
    for name, tokenizer, origin in zip(names, tokenizers, files, strict=True):
        require_embedded(tokenizer, components.text_encoders[name].shapes[_EMBEDDING].shape[0], origin.origin)
    return PromptEncoder(
        names=names,
        tokenizers=tokenizers,
        networks=tuple(components.text_encoders.values()),
        lengths=tuple(components.text_lengths[name] for name in names),
        penultimate=components.is_xl,
    )


def require_embedded(tokenizer: Any, tokens: int, origin: str) -> None:
    """Refuse a tokenizer with ids beyond the text encoder's table, where looking one up raises no error in JAX.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        tokens: size of the table.
        origin: of the tokenizer, for the message.
    """
    most = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= most < tokens:
        raise UserError(f"{origin}: the tokenizer's largest id is {most}, but its text encoder embeds {tokens} tokens")
