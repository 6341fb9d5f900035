"""Token ids of prompts longer than the encoder reads at once. The embedded tokenizer is CLIP's kind, of fewer words."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.conditioning import PromptEncoder, load_tokenizer
from hypersd_jax.conditioning.long_prompts import CutCounter, LongPromptWarning, bare_tokens
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


# Byte-level BPE gives each of these three tokens.
HAN = "".join(chr(0x4E05 + 37 * i) for i in range(60))


def test_rare_characters_are_counted_in_tokens(encoder, tokenizer):
    count = len(bare_tokens(tokenizer, HAN))
    assert count == 180
    windows = encoder.windows([SHORT, HAN])
    assert windows == 13  # of 14 tokens
    inner = encoder.tokenize([HAN], windows=windows)[0][0][:, 1:]
    found = inner[(inner != tokenizer.eos_token_id) & (inner != tokenizer.pad_token_id)]
    np.testing.assert_array_equal(found, bare_tokens(tokenizer, HAN))


def test_what_is_cut_of_rare_characters_is_shown_as_they_are(encoder):
    """A window of 14 tokens ends within the fifth character, which is then not read."""
    short = HAN[:5]
    assert len(short) < LENGTH - 2
    with pytest.warns(LongPromptWarning, match=f"^the prompt is longer than 14 tokens; ignored: '{short[4]}'$"):
        encoder.tokenize([short])


@pytest.mark.parametrize("count", [13, 14, 15, 27, 28, 29])
def test_nothing_is_said_of_a_prompt_that_just_fits(encoder, tokenizer, recwarn, count):
    word = next(w for w in ("apple", "cat", "red") if len(bare_tokens(tokenizer, w)) == 1)
    prompt = " ".join([word] * count)
    encoder.tokenize([prompt])
    assert len(recwarn) == (count > 14)
    assert len(encoder.cuts([prompt])) == (count > 14)


# Longer once in the tokenizer's normal form: U+0958 is two characters there, U+0130 becomes two in lower case.
@pytest.mark.parametrize("text", ["\u0958", "\u0130", "\ufb2c", "\u1f82"])
def test_texts_that_normalisation_lengthens(encoder, tokenizer, text):
    prompt = text * 3
    tokens = bare_tokens(tokenizer, prompt)
    assert encoder.windows([prompt]) == -(-len(tokens) // 14)
    assert bool(encoder.cuts([prompt])) == (len(tokens) > 14)


def test_many_cut_prompts_are_one_warning(encoder):
    prompts = [f"{LONG} {number}" for number in range(20)]
    with pytest.warns(
        LongPromptWarning, match=r"^20 prompts are longer than 14 tokens; ignored, for example of 'a ca"
    ) as said:
        encoder.tokenize([*prompts, SHORT, *prompts])
    assert len(said) == 1


def test_two_encoders_of_other_sizes(tokenizer):
    """What either of them does not read is ignored; windows are as many as the smaller one needs."""
    both = PromptEncoder(
        names=("text_encoder", "text_encoder_2"),
        tokenizers=(tokenizer, tokenizer),
        networks=(count_up, count_up),
        lengths=(LENGTH, 8),
        penultimate=True,
    )
    (cut,) = both.cuts([HAN[:4]])
    assert (cut.ignored, cut.room) == (HAN[2:4], 6)
    assert both.windows([HAN[:4]]) == 2
    assert both.cuts([HAN[:2]]) == []


def test_captions_are_counted_once_each(encoder, recwarn):
    for _ in range(2):
        encoder.tokenize_captions([SHORT, LONG, HAN, LONG])
    encoder.tokenize_captions([SHORT])
    assert len(recwarn) == 0
    line = encoder.caption_cuts.report()
    assert line.startswith(
        "2 captions are longer than the 14 tokens that the text encoder reads; ignored, for example of "
    )
    assert CutCounter().report() is None
