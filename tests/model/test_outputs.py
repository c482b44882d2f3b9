"""Masks bar what their bits say, whether they allow a few tokens, nearly all, or anything between."""

import numpy as np
import pytest
import torch

from llmd.model.outputs import mask_logits


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1000, 5003])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99, 1.0])
def test_masked_logits_are_those_of_the_allowed_tokens(vocab_size, share):
    rng = np.random.default_rng(int(vocab_size + 100 * share))
    words = -(-vocab_size // 32)
    bits = rng.random((3, 32 * words)) < share  # also set behind the vocabulary's end
    bitmask = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    logits = torch.randn(5, vocab_size)
    expected = logits.clone()
    for place, allowed in zip((4, 0, 2), bits, strict=True):
        expected[place, torch.from_numpy(~allowed[:vocab_size])] = float("-inf")
    assert torch.equal(mask_logits(logits, [4, 0, 2], bitmask), expected)
