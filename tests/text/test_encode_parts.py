"""Pairs of texts and cut texts, token by token as transformers encodes them."""

import pytest
from model.tiny_encoders import save_tokenizer
from transformers import AutoTokenizer

from llmd.errors import InvalidRequest
from llmd.text.tokenizer import SlowBackend, Tokenizer

PAIRS = [
    ("a man is eating", "some food"),
    ("hi", "a longer text than the first"),
    ("same", "size"),
    ("odd", "odd"),
    ("", "x"),
]


@pytest.fixture(scope="module", params=["fast", "slow"])
def tokenizers(request, tmp_path_factory):
    path = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    theirs = AutoTokenizer.from_pretrained(path)
    ours = Tokenizer.from_folder(path)
    return (ours if request.param == "fast" else Tokenizer(SlowBackend(theirs), {}, {})), theirs


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs(tokenizers, pair):
    ours, theirs = tokenizers
    for limit in (None, *range(3, 20)):
        options = {} if limit is None else {"max_length": limit, "truncation": "longest_first"}
        expected = theirs(*pair, return_token_type_ids=True, **options)
        found = ours.encode_parts(*pair, max_length=limit)
        assert found.token_ids == expected["input_ids"], limit
        assert found.token_types == expected["token_type_ids"]


def test_single_texts(tokenizers):
    ours, theirs = tokenizers
    for limit in (None, 2, 3, 9, 40):
        options = {} if limit is None else {"max_length": limit, "truncation": True}
        assert (
            ours.encode_parts("a man is eating", max_length=limit).token_ids
            == theirs("a man is eating", **options)["input_ids"]
        )
    assert ours.encode_parts("text").token_ids == ours.encode("text")


def test_the_second_text_alone_is_cut(tokenizers):
    ours, _ = tokenizers
    assert ours.encode_parts("question", "answer", max_other_length=2) == ours.encode_parts("question", "an")


def test_half_a_character_is_refused(tokenizers):
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        tokenizers[0].encode_parts("fine", "\ud800")
