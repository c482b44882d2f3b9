"""Log-probabilities against log_softmax."""

import pytest
import torch

from llmd.model import draw
from llmd.model.outputs import PromptScorer
from llmd.model.staging import Outbox


def prompt_logprobs(logits, next_ids, num_top):
    """What the scorer tells of positions whose logits these are."""
    scorer = PromptScorer(lambda hidden: hidden, Outbox(logits.device))
    scorer.score(4, logits, next_ids, num_top)
    return scorer.take()().get(4, [])


@pytest.mark.parametrize("num_top", [0, 1, 5, 100])
@pytest.mark.parametrize("at_once", [1, 900, 1 << 22])
def test_prompt_logprobs_are_log_softmax(num_top, at_once, monkeypatch):
    monkeypatch.setitem(draw.ELEMENTS_AT_ONCE, "cpu", at_once)
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)) * 3
    next_ids = torch.tensor([0, 299, 5, 5, 17, 100, 200])
    found = prompt_logprobs(logits, next_ids, num_top)
    expected = logits.double().log_softmax(1)
    assert [entry.token_id for entry in found] == next_ids.tolist()
    for at, entry in enumerate(found):
        assert entry.logprob == pytest.approx(expected[at, entry.token_id].item(), abs=1e-5)
        assert entry.rank == (expected[at] > expected[at, entry.token_id]).sum().item() + 1
        top = expected[at].topk(num_top)
        assert list(entry.top_ids) == top.indices.tolist()
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)


def test_no_positions_give_no_entries():
    assert prompt_logprobs(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64), 3) == []


def test_more_top_tokens_than_the_vocabulary_has():
    (entry,) = prompt_logprobs(torch.zeros(1, 4), torch.tensor([2]), 20)
    assert sorted(entry.top_ids) == [0, 1, 2, 3]
    assert entry.rank == 1
