"""Increments against the full decode: random ids, random cuts, every kind of decoder."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import KINDS, LINES, has_mixed_byte_run

from llmd.text.detokenizer import TableDetokenizer, WindowDetokenizer

EXACT = [kind for kind in KINDS if kind != "end_of_word"]


def pieces_of(detokenizer, ids, cuts=None):
    """The increments, one token at a time or cut as told, and what finish() gives."""
    places = range(len(ids)) if cuts is None else [cut % (len(ids) + 1) for cut in cuts]
    starts = sorted({0, *places})
    parts = [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return [*map(detokenizer.feed, parts), detokenizer.finish()]


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_sum_is_the_full_decode(kind, tokenizers_made, data):
    tokenizer = tokenizers_made[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    skip = data.draw(st.booleans())
    cuts = data.draw(st.none() | st.lists(st.integers(0, 30), max_size=6))
    if kind in ("llama", "gemma") and has_mixed_byte_run(tokenizer, ids, skip):
        return
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    assert isinstance(detokenizer, TableDetokenizer)
    assert "".join(pieces_of(detokenizer, ids, cuts)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), tail=st.sampled_from(LINES))
def test_real_text_never_shows_half_a_character(kind, tokenizers_made, text, tail):
    tokenizer = tokenizers_made[kind]
    ids = tokenizer.encode(text.replace("\ufffd", "") + tail, add_special_tokens=False)
    pieces = pieces_of(tokenizer.detokenizer(skip_special_tokens=False), ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_continues_a_prompt(kind, tokenizers_made, data):
    tokenizer = tokenizers_made[kind]
    prompt = tokenizer.encode(data.draw(st.sampled_from(LINES)), add_special_tokens=data.draw(st.booleans()))
    ids = tokenizer.encode(data.draw(st.sampled_from(LINES)), add_special_tokens=False)
    pieces = pieces_of(tokenizer.detokenizer(prompt), ids)
    assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode(prompt + ids)


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_a_prompt_may_end_within_a_character(kind, tokenizers_made):
    tokenizer = tokenizers_made[kind]
    ids = tokenizer.encode("x🦀y", add_special_tokens=False)
    for cut in range(1, len(ids)):
        pieces = pieces_of(tokenizer.detokenizer(ids[:cut]), ids[cut:])
        assert "".join(pieces) == "x🦀y"[len(tokenizer.decode(ids[:cut]).rstrip("\ufffd")) :]


@pytest.mark.parametrize("kind", ["llama", "unigram", "word_piece"])
def test_only_special_tokens_before_mean_the_start_of_a_text(kind, tokenizers_made):
    tokenizer = tokenizers_made[kind]
    special = next(iter(sorted(tokenizer.special_ids)))
    ids = tokenizer.encode("hello there", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer.detokenizer([special]), ids)) == tokenizer.decode(ids)


def test_invalid_bytes_keep_the_characters_before_them(tokenizers_made):
    tokenizer = tokenizers_made["llama"]
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode() + b"\xff\xe4\xbd"]
    assert "".join(pieces_of(tokenizer.detokenizer(), ids)) == "é\ufffd\ufffd\ufffd"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_window_gives_the_same_for_real_text(kind, tokenizers_made, data):
    tokenizer = tokenizers_made[kind]
    ids = tokenizer.encode(" ".join(data.draw(st.lists(st.sampled_from(LINES), max_size=3))))
    pieces = pieces_of(WindowDetokenizer(tokenizer.decode), ids)
    assert "".join(pieces).replace(" ", "") == tokenizer.decode(ids).replace(" ", "")


def test_unknown_decoders_use_the_window(tokenizers_made):
    tokenizer = tokenizers_made["end_of_word"]
    ids = tokenizer.encode("the quick brown fox")
    detokenizer = tokenizer.detokenizer()
    assert isinstance(detokenizer, WindowDetokenizer)
    assert "".join(pieces_of(detokenizer, ids)) == "the quick brown fox"


def test_the_window_does_not_wait_forever(tokenizers_made):
    tokenizer = tokenizers_made["byte_level"]
    bad = next(token_id for token_id in range(tokenizer.vocab_size) if tokenizer.token_bytes(token_id) == b"\xff")
    window = WindowDetokenizer(tokenizer.decode)
    text = "".join(window.feed([bad]) for _ in range(1000))
    assert len(text) > 900
    assert len(window._ids) < 100


def test_no_spaces_between_special_tokens(tokenizers_made):
    tokenizer = tokenizers_made["word_piece"]
    ids = [2, 3, *tokenizer.encode("dog", add_special_tokens=False), 3, 3]
    with_spaces = tokenizer.detokenizer(skip_special_tokens=False)
    compact = tokenizer.detokenizer(skip_special_tokens=False, spaces_between_special_tokens=False)
    assert "".join(pieces_of(with_spaces, ids)) == "[CLS] [SEP] dog [SEP] [SEP]"
    assert "".join(pieces_of(compact, ids)) == "[CLS][SEP] dog [SEP][SEP]"
