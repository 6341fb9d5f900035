"""From prompts to the conditioning of the UNet: token ids, then text embeddings.

SD 1.x and 2.x use one text encoder's last hidden state. SDXL joins the penultimate hidden states of two encoders and
adds the second one's pooled projection and six numbers about the image's size ("micro-conditioning",
arXiv 2307.01952, section 2.2).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.conditioning.long_prompts import (
    Cut,
    CutCounter,
    OnCut,
    find_cut,
    in_windows,
    warn_of_cuts,
    window_count,
)
from hypersd_jax.errors import UserError, short
from hypersd_jax.models.functional import Network
from hypersd_jax.weights.tokenizers import TokenizerFiles

# A tokenizer holds how its last call cut and padded, and captions are read in a thread beside the one that samples.
_TOKENIZING = threading.Lock()


class Conditioning(NamedTuple):
    """Conditioning of the UNet: ``context`` (B, S, D); SDXL also ``pooled`` (B, P), ``time_ids`` (B, 6)."""

    context: jax.Array
    pooled: jax.Array | None = None
    time_ids: jax.Array | None = None

    def zeroed(self, which: Any) -> Conditioning:
        """Return a copy with zeros for the text of the samples that ``which`` (B,) marks; sizes stay."""
        marks = jnp.asarray(which)
        pooled = None if self.pooled is None else jnp.where(marks[:, None], 0, self.pooled)
        return self._replace(context=jnp.where(marks[:, None, None], 0, self.context), pooled=pooled)

    def unet_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the UNet's call beside ``context``."""
        if self.pooled is None or self.time_ids is None:
            return {}
        return {"pooled": self.pooled, "time_ids": self.time_ids}


def size_ids(height: int, width: int, batch: int) -> np.ndarray:
    """SDXL's time ids of uncropped images, (B, 6): original (h, w), crop (top, left), target (h, w) in pixels."""
    return np.tile(np.asarray([height, width, 0, 0, height, width], np.float32), (batch, 1))


def load_tokenizer(tokenizer: TokenizerFiles) -> Any:
    """The CLIP tokenizer of a model; raises `UserError` naming where its files are."""
    from transformers import CLIPTokenizer  # slow to import, and only sampling and training need it

    if not tokenizer.files.keys() & {"vocab.json", "tokenizer.json"}:
        raise UserError(f"{tokenizer.origin}: no tokenizer files (vocab.json and merges.txt)")
    try:
        with tokenizer.in_folder() as folder:
            read = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        for mark in ("bos_token", "eos_token", "pad_token"):
            if getattr(read, f"{mark}_id") is None:
                raise ValueError(f"it has no {mark}")
    except Exception as error:  # the library raises many kinds on broken files
        reason = short(next(iter(str(error).splitlines()), type(error).__name__))
        raise UserError(f"{tokenizer.origin}: the tokenizer cannot be read ({reason})") from None
    return read


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """One or two CLIP text encoders, as networks, with their tokenizers; parameters are passed to `encode`.

    ``penultimate`` is SDXL's reading: hidden states one layer before the last, without the final norm, of each encoder,
    joined on the channel axis.

    Attributes:
        names: of the encoders, "text_encoder" and "text_encoder_2".
        tokenizers: one for each.
        networks: one for each.
        lengths: tokens that each holds, S.
        penultimate: whether this is SDXL's reading.
        caption_cuts: what of the captions was cut since the encoder was made, see `tokenize_captions`.
    """

    names: tuple[str, ...]
    tokenizers: tuple[Any, ...]
    networks: tuple[Network, ...]
    lengths: tuple[int, ...]
    penultimate: bool
    caption_cuts: CutCounter = dataclasses.field(default_factory=CutCounter, compare=False)

    def windows(self, prompts: Sequence[str]) -> int:
        """Count the windows of S tokens that the longest prompt fills; its negative prompts need as many."""
        pairs = zip(self.tokenizers, self.lengths, strict=True)
        return max(window_count(tokenizer, prompts, length) for tokenizer, length in pairs)

    def tokenize(
        self, prompts: Sequence[str], *, windows: int | None = None, on_cut: OnCut = warn_of_cuts
    ) -> tuple[np.ndarray, ...]:
        """Tokenize prompts for each encoder, int32; text that does not fit is cut.

        Args:
            prompts: B texts.
            windows: None: ids (B, S), what one reading of the encoder holds. n: ids (B, n, S), read apart by `encode`
                and joined, as A1111 and ComfyUI read long prompts; shorter prompts end in empty windows.
            on_cut: called with the prompts that are cut, if any are; by default it warns.
        """
        ids: list[np.ndarray] = []
        cuts: dict[str, Cut] = {}
        with _TOKENIZING:
            for tokenizer, length in zip(self.tokenizers, self.lengths, strict=True):
                if windows is None:
                    found = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
                    ids.append(np.asarray(found["input_ids"], np.int32))
                    # Nothing is cut where padding follows; a full sequence is either cut or just fits.
                    masks = zip(prompts, found["attention_mask"], strict=True)
                    long = [prompt for prompt, mask in masks if all(mask)]
                else:
                    ids.append(in_windows(tokenizer, prompts, length, windows))
                    long = list(prompts)
                for prompt in dict.fromkeys(long):
                    cut = find_cut(tokenizer, prompt, (length - 2) * (windows or 1))
                    # Of two encoders the one that reads least.
                    if cut is not None and (prompt not in cuts or len(cut.ignored) > len(cuts[prompt].ignored)):
                        cuts[prompt] = cut
        if cuts:
            on_cut(list(cuts.values()))
        return tuple(ids)

    def tokenize_captions(self, captions: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Tokenize the captions of a dataset; those that are cut are counted, not warned of one by one."""
        return self.tokenize(captions, on_cut=self.caption_cuts)

    def cuts(self, prompts: Sequence[str]) -> list[Cut]:
        """Find what `tokenize` would cut off these prompts, each once."""
        found: list[Cut] = []
        if prompts:
            self.tokenize(list(dict.fromkeys(prompts)), on_cut=found.extend)
        return found

    def encode(
        self,
        params: Mapping[str, Mapping[str, jax.Array]],
        ids: Sequence[jax.Array],
        *,
        adapters: Mapping[str, Any] | None = None,
        dtype: Any = None,
    ) -> Conditioning:
        """Compute text embeddings of token ids; pure, to be traced; ``adapters`` are LoRAs by encoder name.

        Of ids in n windows the contexts are joined, (B, n * S, D), and the pooled vector is that of the first window.
        """
        adapters = adapters or {}
        batch, windows = ids[0].shape[0], ids[0].shape[1] if ids[0].ndim == 3 else 1
        outputs = [
            network(params[name], tokens.reshape(batch * windows, -1), adapter=adapters.get(name))
            for name, network, tokens in zip(self.names, self.networks, ids, strict=True)
        ]
        if self.penultimate:
            context = jnp.concatenate([output.penultimate for output in outputs], axis=-1)
            pooled = outputs[-1].pooled[::windows]
        else:
            context, pooled = outputs[0].last, None
        context = context.reshape(batch, -1, context.shape[-1])
        if dtype is not None:
            context = context.astype(dtype)
            pooled = None if pooled is None else pooled.astype(dtype)
        return Conditioning(context=context, pooled=pooled)
