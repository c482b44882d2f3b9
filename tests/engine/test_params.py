"""SamplingParams refuses what is out of bounds by name, and stores one form of everything."""

from __future__ import annotations

import math

import pytest

from llmd.engine.params import PoolingParams, SamplingParams
from llmd.errors import InvalidParams

BAD = {
    "n": [0, -1, 129, 1.0, "2", True],
    "temperature": [-0.1, math.nan, math.inf, "hot", 101, True],
    "top_p": [0, -0.5, 1.01, math.nan],
    "top_k": [-2, 0.5, 2**31],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1, "0"],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, 1e9],
    "seed": [2**63, "x", 1.5],
    "stop": [[1], [""], ["x" * 1025], ["a"] * 65, 5],
    "stop_token_ids": [[-1], ["a"], "ab", 5, [2**31], [1] * 257],
    "bad_words": [[""], [3]],
    "max_tokens": [0, -1, 1.5],
    "min_tokens": [-1, 17],
    "logprobs": [-1, 101, 0.5],
    "prompt_logprobs": [-1, True],
    "logit_bias": [[1], {"a": 1}, {1: 101}, {-1: 0}, {1: math.nan}, {str(i): 0 for i in range(1025)}],
    "allowed_token_ids": [[], [-1], 3],
    "ignore_eos": [1, "yes", None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_values_out_of_bounds_are_refused_by_name(name, value):
    with pytest.raises(InvalidParams) as refused:
        SamplingParams(**{name: value})
    assert refused.value.param == name
    assert len(str(refused.value)) < 400


def test_lists_and_strings_are_stored_as_tuples():
    params = SamplingParams(stop="end", stop_token_ids=[1, 2], logit_bias={"5": 1}, allowed_token_ids=[3], bad_words=["no"])
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (1, 2), {5: 1.0})
    assert (params.allowed_token_ids, params.bad_words) == ((3,), ("no",))
    assert SamplingParams(stop=None).stop == ()
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams().is_greedy


def test_pooling_is_one_of_those_that_are_served():
    with pytest.raises(InvalidParams, match="one of last, cls, mean, max"):
        PoolingParams(pooling="median")
    with pytest.raises(InvalidParams, match="dimensions"):
        PoolingParams(dimensions=0)
