"""The plugin against a walk through the output."""

import pytest
import torch
from model.sampling_reference import CONTEXT, V, apply, make_admit, processed

from llmd.engine.params import SamplingParams
from llmd_plugins.sampling import bad_words


def build():
    (spec,) = bad_words.llmd_register_logits_processors()
    assert spec.name == "bad_words"
    return spec.build(CONTEXT)


WORDS = [[7], [5, 6], [6, 6, 6, 1], [5, 9], [6, 9], [4, 5, 6, 2]]


@pytest.mark.parametrize("tokens", [[1], [5], [1, 2, 5], [1, 2, 6, 6, 6], [1, 2, 4, 5, 6], [5, 6, 6, 6]], ids=str)
def test_the_last_token_of_a_begun_word_is_impossible(tokens):
    x = torch.randn(2, V)
    num_prompt = min(2, len(tokens))
    admits = [
        make_admit(3, tokens=tokens, num_prompt=num_prompt, bad_words_ids=WORDS),
        make_admit(1, tokens=tokens, num_prompt=num_prompt, bad_words_ids=[[8]]),
    ]
    out = apply(build(), x, admits, places=[1, 0])
    for at, admit in ((1, admits[0]), (0, admits[1])):
        assert out[at].tolist() == pytest.approx(processed(x[at].tolist(), admit, list(tokens)))


def test_two_words_with_one_end_do_not_free_each_other():
    admit = make_admit(tokens=[1, 5], num_prompt=1, bad_words_ids=[[5, 9], [6, 9], [9, 9]])
    assert apply(build(), torch.zeros(1, V), [admit])[0, 9] == float("-inf")


def test_words_outside_the_vocabulary_or_empty_do_no_harm():
    admit = make_admit(tokens=[1, 5], num_prompt=1, bad_words_ids=[[V], [V, 3], [3, V + 9], []])
    assert torch.equal(apply(build(), torch.zeros(1, V), [admit]), torch.zeros(1, V))


def test_who_wants_it_and_what_is_left_after_release():
    processor = build()
    assert processor.wants(SamplingParams(bad_words=["x"]))
    assert not processor.wants(SamplingParams())
    processor.admit(make_admit(0, bad_words_ids=[[1]]))
    processor.release(0)
    assert not processor._words
