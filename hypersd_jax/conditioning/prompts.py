"""From prompts to what the UNet is conditioned on: token ids, then text embeddings.

SD 1.x and 2.x use one text encoder's last hidden state. SDXL joins the penultimate hidden states of two encoders and
adds the second one's pooled projection and six numbers about the picture's size ("micro-conditioning",
arXiv 2307.01952, section 2.2).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.errors import UserError
from hypersd_jax.models.functional import Network


class Conditioning(NamedTuple):
    """What the UNet reads beside latents: ``context`` (B, S, D); SDXL also ``pooled`` (B, P), ``time_ids`` (B, 6)."""

    context: jax.Array
    pooled: jax.Array | None = None
    time_ids: jax.Array | None = None

    def unet_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the UNet's call beside ``context``."""
        if self.pooled is None or self.time_ids is None:
            return {}
        return {"pooled": self.pooled, "time_ids": self.time_ids}


def size_ids(height: int, width: int, batch: int) -> np.ndarray:
    """SDXL's time ids of uncropped pictures, (B, 6): original (h, w), crop (top, left), target (h, w) in pixels."""
    return np.tile(np.asarray([height, width, 0, 0, height, width], np.float32), (batch, 1))


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer of a diffusers folder; raises `UserError` naming the folder."""
    from transformers import CLIPTokenizer  # slow to import, and only sampling and training need it

    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer files (vocab.json and merges.txt)")
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises many kinds on broken files
        raise UserError(f"{folder}: the tokenizer cannot be read ({str(error).splitlines()[0]})") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """One or two CLIP text encoders, as networks, with their tokenizers; parameters are passed to `encode`.

    ``penultimate`` is SDXL's reading: hidden states one layer before the last, without the final norm, of each encoder,
    joined on the channel axis.
    """

    names: tuple[str, ...]
    tokenizers: tuple[Any, ...]
    networks: tuple[Network, ...]
    lengths: tuple[int, ...]
    penultimate: bool

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Token ids (B, S) int32 for each encoder; text beyond S tokens is cut, with a warning that shows it."""
        ids = []
        for tokenizer, length in zip(self.tokenizers, self.lengths, strict=True):
            found = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)["input_ids"]
            ids.append(np.asarray(found, np.int32))
        self._warn_if_cut(prompts)
        return tuple(ids)

    def _warn_if_cut(self, prompts: Sequence[str]) -> None:
        tokenizer, length = self.tokenizers[0], self.lengths[0]
        for prompt in dict.fromkeys(prompts):
            if len(prompt) < length:  # a token is at least one character
                continue
            tokens = tokenizer(prompt, truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
            if len(tokens) > length - 2:
                cut = tokenizer.decode(tokens[length - 2 :])
                warnings.warn(f"the prompt is longer than {length - 2} tokens; ignored: {cut!r}", stacklevel=4)

    def encode(
        self,
        params: Mapping[str, Mapping[str, jax.Array]],
        ids: Sequence[jax.Array],
        *,
        adapters: Mapping[str, Any] | None = None,
        dtype: Any = None,
    ) -> Conditioning:
        """Text embeddings of token ids, a pure function to be traced; ``adapters`` are LoRAs by encoder name."""
        adapters = adapters or {}
        outputs = [
            network(params[name], tokens, adapter=adapters.get(name))
            for name, network, tokens in zip(self.names, self.networks, ids, strict=True)
        ]
        if self.penultimate:
            context = jnp.concatenate([output.penultimate for output in outputs], axis=-1)
            pooled = outputs[-1].pooled
        else:
            context, pooled = outputs[0].last, None
        if dtype is not None:
            context = context.astype(dtype)
            pooled = None if pooled is None else pooled.astype(dtype)
        return Conditioning(context=context, pooled=pooled)
