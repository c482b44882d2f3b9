"""A part of a row a program; words whose bits are all set cost a load and no store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # tokens


@triton.jit
def bar(logits, places, words, x_stride, num_words, width, BLOCK: tl.constexpr):
    """-inf where a token's bit is not set."""
    mask = tl.program_id(0).to(tl.int64)
    logits += tl.load(places + mask) * x_stride
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + mask * num_words + token // 32, mask=token < width, other=-1)
    is_barred = ((word >> (token % 32)) & 1) == 0
    tl.store(logits + token, float("-inf"), mask=is_barred & (token < width))


def mask_logits(logits: torch.Tensor, places: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """As in the package."""
    num, num_words = words.shape
    if num:
        bar[(num, triton.cdiv(logits.shape[1], _BLOCK))](
            logits, places, words, logits.stride(0), num_words, logits.shape[1], BLOCK=_BLOCK
        )
    return logits
