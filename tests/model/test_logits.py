"""Each logits processor against the plain Python reference."""

import pytest
import torch
from model.sampling_reference import CONTEXT, V, apply, make_admit, processed

from llmd.engine.params import SamplingParams
from llmd.model import logits as logits_module
from llmd.model.logits import AllowedTokens, LogitBias, MinTokens, Penalties, core_processors

CASES = [
    (LogitBias, {"logit_bias": {0: 5, 299: -100, 7: 0.5}}, {"logit_bias": {0: 1}}),
    (AllowedTokens, {"allowed_token_ids": [0, 299, 7, 7]}, {"allowed_token_ids": list(range(200))}),
    (MinTokens, {"min_tokens": 3, "stop_token_ids": [9, 9], "eos": [2]}, {"min_tokens": 2, "eos": [4]}),
    (Penalties, {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6}),
    (Penalties, {"presence_penalty": 1.5}, {"frequency_penalty": -0.7}),
    (Penalties, {"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 0.5}, {"presence_penalty": -1}),
]


@pytest.mark.parametrize(("kind", "first", "second"), CASES)
def test_a_processor_is_the_reference(kind, first, second):
    x = torch.randn(4, V, generator=torch.Generator().manual_seed(1))
    admits = [
        make_admit(9, tokens=[5, 0, 5, 7, 7, 8], num_prompt=3, **first),
        make_admit(2, tokens=[1, 299, 299, 299], num_prompt=2, **second),
    ]
    processor = kind(CONTEXT)
    assert all(processor.wants(admit.params) for admit in admits)
    assert not processor.wants(SamplingParams())
    out = apply(processor, x, admits, places=[3, 1])
    for at, admit in ((3, admits[0]), (1, admits[1])):
        expected = torch.tensor(processed(x[at].tolist(), admit, list(admit.token_ids)))
        torch.testing.assert_close(out[at], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(out[[0, 2]], x[[0, 2]])


def test_min_tokens_ends_when_they_are_reached():
    x = torch.zeros(1, V)
    for num_output, barred in ((0, True), (1, True), (2, False)):
        admit = make_admit(tokens=[1] * (4 + num_output), num_prompt=4, min_tokens=2, eos=[6])
        assert (apply(MinTokens(CONTEXT), x, [admit])[0, 6] == float("-inf")) == barred


@pytest.mark.parametrize("kind", [LogitBias, AllowedTokens, MinTokens, Penalties])
def test_ids_outside_the_vocabulary_do_no_harm(kind):
    x = torch.randn(1, V)
    params = {
        "logit_bias": {V: 5.0, 2**31 - 1: 1.0, 3: 1.0},
        "allowed_token_ids": [V, 3, 2**31 - 1],
        "stop_token_ids": [V, 3],
        "min_tokens": 5,
        "presence_penalty": 1.0,
    }
    admit = make_admit(tokens=[3, V + 7, 3], num_prompt=1, eos=[V + 1], **params)
    out = apply(kind(CONTEXT), x, [admit])
    assert out.shape == x.shape
    assert not out.isnan().any()


def test_the_scratch_of_penalties_is_shared_bounded_and_left_clean(monkeypatch):
    monkeypatch.setattr(logits_module, "_SCRATCH_BYTES", 2 * V * 8)  # two rows at once
    x = torch.randn(5, V, generator=torch.Generator().manual_seed(2))
    admits = [
        make_admit(row, tokens=[row, 3, 3, row], num_prompt=1, frequency_penalty=0.5, repetition_penalty=1.2)
        for row in range(5)
    ]
    processor = Penalties(CONTEXT)
    assert processor._scratch is None
    for _ in range(2):
        out = apply(processor, x, admits)
        assert processor._scratch.shape == (2, V)
        assert not processor._scratch.any()
    for at, admit in enumerate(admits):
        expected = torch.tensor(processed(x[at].tolist(), admit, list(admit.token_ids)))
        torch.testing.assert_close(out[at], expected, atol=1e-5, rtol=1e-5)


def test_masks_run_before_penalties_and_plugins_between():
    other = LogitBias(CONTEXT)
    kinds = [type(p) for p in core_processors(CONTEXT, [other])]
    assert kinds == [LogitBias, AllowedTokens, MinTokens, LogitBias, Penalties]
