"""The scorers' two ways to read a prompt: words in their order, through a transformer layer; letter groups in a bag."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Params = Mapping[str, jax.Array]

# Token 0 fills up; token 1 stands for every word that the vocabulary lacks.
PADDING, UNKNOWN, FIRST_WORD = 0, 1, 2
MOST_WORDS = 16
WORD_WIDTH, HEADS, LAYERS = 96, 4, 1
MOST_GROUPS = 96
BUCKETS, GROUP_WIDTH = 4096, 96
MASKED = -1e9


def split_words(prompt: str) -> list[str]:
    """Lower-case words and numbers, with commas as words of their own, for they part name, style and background."""
    return re.findall(r"[^\W_]+|,", prompt.lower())


def word_tokens(prompts: Sequence[str], vocabulary: Sequence[str]) -> np.ndarray:
    """int32 (B, 16): the index of each word in the vocabulary, plus 2; words beyond the 16th are not read."""
    indices = {word: number for number, word in enumerate(vocabulary, start=FIRST_WORD)}
    tokens = np.full((len(prompts), MOST_WORDS), PADDING, np.int32)
    for row, prompt in enumerate(prompts):
        found = [indices.get(word, UNKNOWN) for word in split_words(prompt)[:MOST_WORDS]]
        tokens[row, : len(found)] = found
    return tokens


def letter_tokens(prompts: Sequence[str]) -> np.ndarray:
    """int32 (B, 96): hashed groups of three letters, words, and pairs of neighbouring words, each once, in no order."""
    tokens = np.full((len(prompts), MOST_GROUPS), PADDING, np.int32)
    for row, prompt in enumerate(prompts):
        groups = list(dict.fromkeys(_groups(prompt)))[:MOST_GROUPS]
        tokens[row, : len(groups)] = [1 + zlib.crc32(group.encode()) % BUCKETS for group in groups]
    return tokens


def _groups(prompt: str) -> Iterator[str]:
    """Words and pairs first, since they say most where a prompt is longer than the bag."""
    listed = [word for word in split_words(prompt) if word != ","]
    yield from listed
    yield from (f"{a} {b}" for a, b in itertools.pairwise(listed))
    for word in listed:
        marked = f"<{word}>"
        yield from (marked[i : i + 3] for i in range(len(marked) - 2))


def words(params: Params, tokens: jax.Array) -> jax.Array:
    """The transformer over words (B, L) in their order: (B, D). Mean over words, padding left out."""
    kept = tokens != PADDING
    x = params["words.table"][tokens] + params["words.places"][None, : tokens.shape[1]]
    for layer in range(LAYERS):
        name = f"words.{layer}"
        x = x + _attention(params, name, _normed(params, f"{name}.norm1", x), kept)
        hidden = linear(params, f"{name}.up", _normed(params, f"{name}.norm2", x))
        x = x + linear(params, f"{name}.down", jax.nn.gelu(hidden, approximate=False))
    return linear(params, "words.out", _mean(_normed(params, "words.norm", x), kept))


def letters(params: Params, tokens: jax.Array) -> jax.Array:
    """The bag of letter groups (B, L): (B, D). Mean of the groups, one hidden layer."""
    x = _mean(params["letters.table"][tokens], tokens != PADDING)
    x = jax.nn.gelu(linear(params, "letters.hidden", x), approximate=False)
    return linear(params, "letters.out", x)


def init_words(key: jax.Array, vocabulary: int, width: int) -> dict[str, jax.Array]:
    """Fresh parameters of `words`, with outputs of ``width``."""
    table, positions, out, *layers = jax.random.split(key, 3 + LAYERS)
    params = {
        "words.table": 0.05 * jax.random.normal(table, (FIRST_WORD + vocabulary, WORD_WIDTH)),
        "words.places": 0.05 * jax.random.normal(positions, (MOST_WORDS, WORD_WIDTH)),
        **init_linear("words.out", out, WORD_WIDTH, width),
        **_init_norm("words.norm"),
    }
    for layer, layer_key in enumerate(layers):
        name, keys = f"words.{layer}", jax.random.split(layer_key, 4)
        params |= init_linear(f"{name}.qkv", keys[0], WORD_WIDTH, 3 * WORD_WIDTH)
        params |= init_linear(f"{name}.merge", keys[1], WORD_WIDTH, WORD_WIDTH)
        params |= init_linear(f"{name}.up", keys[2], WORD_WIDTH, 4 * WORD_WIDTH)
        params |= init_linear(f"{name}.down", keys[3], 4 * WORD_WIDTH, WORD_WIDTH)
        params |= _init_norm(f"{name}.norm1") | _init_norm(f"{name}.norm2")
    return params


def init_letters(key: jax.Array, width: int) -> dict[str, jax.Array]:
    """Fresh parameters of `letters`, with outputs of ``width``."""
    table, hidden, out = jax.random.split(key, 3)
    return {
        "letters.table": jax.random.normal(table, (1 + BUCKETS, GROUP_WIDTH)),
        **init_linear("letters.hidden", hidden, GROUP_WIDTH, 2 * width),
        **init_linear("letters.out", out, 2 * width, width),
    }


def linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    """x (..., I) times the kernel (I, O), plus the bias."""
    y = jnp.matmul(x, params[f"{name}.kernel"], precision=jax.lax.Precision.HIGHEST)
    return y + jnp.broadcast_to(params[f"{name}.bias"], y.shape)


def init_linear(name: str, key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """A kernel of variance 1 / inputs and a zero bias."""
    kernel = jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs)
    return {f"{name}.kernel": kernel, f"{name}.bias": jnp.zeros((outputs,))}


def _init_norm(name: str) -> dict[str, jax.Array]:
    return {f"{name}.scale": jnp.ones((WORD_WIDTH,)), f"{name}.bias": jnp.zeros((WORD_WIDTH,))}


def _normed(params: Params, name: str, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    return y * params[f"{name}.scale"][None, None] + params[f"{name}.bias"][None, None]


def _attention(params: Params, name: str, x: jax.Array, kept: jax.Array) -> jax.Array:
    """Full attention among the words of each prompt."""
    batch, length, width = x.shape
    shape = (batch, length, HEADS, width // HEADS)
    query, key, value = (part.reshape(shape) for part in jnp.split(linear(params, f"{name}.qkv", x), 3, axis=-1))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision="highest") / np.sqrt(width // HEADS)
    weights = jax.nn.softmax(jnp.where(kept[:, None, None, :], logits, MASKED), axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision="highest")
    return linear(params, f"{name}.merge", mixed.reshape(batch, length, width))


def _mean(x: jax.Array, kept: jax.Array) -> jax.Array:
    """Mean (B, D) over the positions of x (B, L, D) that are kept; zeros where none is."""
    share = kept / jnp.maximum(jnp.sum(kept, axis=1, keepdims=True), 1)
    return jnp.sum(x * share[:, :, None], axis=1)
