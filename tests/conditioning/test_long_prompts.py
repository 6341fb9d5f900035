"""Token ids of prompts longer than the encoder reads at once. The embedded tokenizer is CLIP's kind, of fewer words."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.conditioning import PromptEncoder, load_tokenizer
from hypersd_jax.conditioning.long_prompts import bare_tokens
from hypersd_jax.models.clip_text import TextOutput
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.tokenizers import tokenizer_files

LENGTH = 16
SHORT, LONG = "red apple", "a cat face, noto style, blue background, " * 6


def count_up(params, tokens, adapter=None):
    """Stands in for a text encoder: each position's state is its id, the pooled vector the sum."""
    states = jnp.stack([tokens, tokens + 1], axis=-1).astype(jnp.float32)
    return TextOutput(last=states, penultimate=2 * states, pooled=jnp.sum(states, axis=1))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tokenizer_files(assets() / "teacher" / "tokenizer"))


@pytest.fixture
def encoder(tokenizer):
    return PromptEncoder(
        names=("text_encoder", "text_encoder_2"),
        tokenizers=(tokenizer, tokenizer),
        networks=(count_up, count_up),
        lengths=(LENGTH, LENGTH),
        penultimate=True,
    )


def test_one_window_is_what_the_tokenizer_gives(encoder):
    (plain, _), (windowed, _) = encoder.tokenize([SHORT, ""]), encoder.tokenize([SHORT, ""], windows=1)
    assert windowed.shape == (2, 1, LENGTH)
    assert windowed.dtype == np.int32
    np.testing.assert_array_equal(windowed[:, 0], plain)


def test_a_window_for_every_14_tokens(encoder, tokenizer):
    tokens = bare_tokens(tokenizer, LONG)
    windows = encoder.windows([SHORT, LONG])
    assert windows == -(-len(tokens) // (LENGTH - 2)) > 2
    assert encoder.windows([SHORT, ""]) == encoder.windows([]) == 1
    ids = encoder.tokenize([SHORT, LONG], windows=windows)[0]
    assert ids.shape == (2, windows, LENGTH)
    inner = ids[1][:, 1:]
    found = inner[(inner != tokenizer.eos_token_id) & (inner != tokenizer.pad_token_id)]
    np.testing.assert_array_equal(found, tokens)
    assert np.all(ids[..., 0] == tokenizer.bos_token_id)
    assert np.all(np.any(ids[..., 1:] == tokenizer.eos_token_id, axis=-1))


def test_exactly_full_windows(encoder, tokenizer):
    word = next(w for w in ("apple", "cat", "red") if len(bare_tokens(tokenizer, w)) == 1)
    for count, windows in ((14, 1), (15, 2), (28, 2), (29, 3)):
        prompt = " ".join([word] * count)
        assert len(bare_tokens(tokenizer, prompt)) == count
        assert encoder.windows([prompt]) == windows
        last = encoder.tokenize([prompt], windows=windows)[0][0, -1]
        assert last[(count - 1) % 14 + 2] == tokenizer.eos_token_id


def test_shorter_prompts_end_in_empty_windows(encoder):
    ids = encoder.tokenize([SHORT], windows=3)[0][0]
    empty = encoder.tokenize([""])[0][0]
    np.testing.assert_array_equal(ids[1:], [empty, empty])


def test_cut_with_a_warning_unless_asked(encoder):
    with pytest.warns(UserWarning, match="longer than 14 tokens; ignored"):
        cut = encoder.tokenize([LONG])[0]
    assert cut.shape == (1, LENGTH)
    with pytest.warns(UserWarning, match="longer than 28 tokens; ignored"):
        encoder.tokenize([LONG], windows=2)
    np.testing.assert_array_equal(encoder.tokenize([LONG], windows=encoder.windows([LONG]))[0][0, 0, :-1], cut[0, :-1])


def test_windows_are_joined_in_order_and_pooled_is_the_firsts(encoder):
    params = {name: {} for name in encoder.names}
    ids = encoder.tokenize([SHORT, LONG], windows=encoder.windows([LONG]))
    cond = encoder.encode(params, [jnp.asarray(part) for part in ids])
    batch, windows, length = ids[0].shape
    assert cond.context.shape == (batch, windows * length, 4)
    np.testing.assert_array_equal(cond.context[..., 0], 2 * ids[0].reshape(batch, -1))
    np.testing.assert_array_equal(cond.pooled[:, 0], ids[0][:, 0].sum(axis=-1))


def test_a_single_window_encodes_as_before(encoder):
    params = {name: {} for name in encoder.names}
    plain = encoder.encode(params, [jnp.asarray(part) for part in encoder.tokenize([SHORT])])
    windowed = encoder.encode(params, [jnp.asarray(part) for part in encoder.tokenize([SHORT], windows=1)])
    np.testing.assert_array_equal(plain.context, windowed.context)
    np.testing.assert_array_equal(plain.pooled, windowed.pooled)
