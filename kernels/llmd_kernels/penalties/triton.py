"""Two passes over a row's tokens, each split among programs that leap over one another.

count   a token's place in the scratch gets a bit for the prompt and two for each time it was put out; biases are added
apply   whoever takes a token's count away, and with it leaves the scratch clean, changes that token's logit: nobody else
        will, however often the row has the token
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from llmd_kernels.penalties import Bias

_BLOCK = 1024
_SPLITS = 16


@triton.jit
def tokens_at(token_ids, line, line_stride, i, num_tokens, width):
    """A row's tokens at positions i, and which of them count."""
    token = tl.load(token_ids + line * line_stride + i, mask=i < num_tokens, other=-1).to(tl.int64)
    return token, (token >= 0) & (token < width)


@triton.jit
def count(
    logits, rows, num_tokens, token_ids, facts, scratch, starts, ids, biases, x_stride, line_stride, width,
    HAS_PENALTIES: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds biases to the logits, and counts tokens of rows that have penalties."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if HAS_BIAS:
        last = tl.load(starts + row + 1)
        for start in range(tl.load(starts + row) + split * BLOCK, last, SPLITS * BLOCK):
            i = start + tl.arange(0, BLOCK)
            place = logits + row * x_stride + tl.load(ids + i, mask=i < last, other=0)
            added = tl.load(place, mask=i < last, other=0.0) + tl.load(biases + i, mask=i < last, other=0.0)
            tl.store(place, added, mask=i < last)
    if HAS_PENALTIES:
        line = tl.load(rows + row)
        facts += line * 4
        num_prompt, repetition = tl.load(facts).to(tl.int32), tl.load(facts + 1)
        if (repetition != 1.0) | (tl.load(facts + 2) != 0.0) | (tl.load(facts + 3) != 0.0):
            num = tl.load(num_tokens + row).to(tl.int32)
            for start in range(split * BLOCK, num, SPLITS * BLOCK):
                i = start + tl.arange(0, BLOCK)
                token, counts = tokens_at(token_ids, line, line_stride, i, num, width)
                place = scratch + row * width + token
                tl.atomic_or(place, 1, mask=counts & (i < num_prompt), sem="relaxed")
                tl.atomic_add(place, 2, mask=counts & (i >= num_prompt), sem="relaxed")


@triton.jit
def apply(
    logits, rows, num_tokens, token_ids, facts, scratch, x_stride, line_stride, width,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Changes the logits of the tokens that were counted."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line = tl.load(rows + row)
    facts += line * 4
    repetition, frequency, presence = tl.load(facts + 1), tl.load(facts + 2), tl.load(facts + 3)
    if (repetition == 1.0) & (frequency == 0.0) & (presence == 0.0):
        return
    num = tl.load(num_tokens + row).to(tl.int32)
    for start in range(split * BLOCK, num, SPLITS * BLOCK):
        i = start + tl.arange(0, BLOCK)
        token, counts = tokens_at(token_ids, line, line_stride, i, num, width)
        seen = tl.atomic_and(
            scratch + row * width + token, 0, mask=counts, sem="relaxed"
        )  # AMD's compiler lacks an exchange
        is_mine = counts & (seen != 0)
        place = logits + row * x_stride + token
        value = tl.load(place, mask=is_mine, other=0.0)
        value = tl.where(value > 0.0, tl.div_rn(value, repetition), value * repetition)
        times = (seen >> 1).to(tl.float32)
        value = value - frequency * times - tl.where(times > 0.0, presence, 0.0)
        tl.store(place, value, mask=is_mine)


def penalise(
    logits: torch.Tensor, rows: torch.Tensor, num_tokens: torch.Tensor, token_ids: torch.Tensor,
    facts: torch.Tensor | None, scratch: torch.Tensor | None, bias: Bias | None = None,
) -> torch.Tensor:  # fmt: skip
    """As in the package."""
    if (facts is None) != (scratch is None):
        raise ValueError("penalties want facts of rows and a scratch, or neither")
    if facts is None and bias is None:
        return logits
    size = len(rows) if scratch is None else scratch.shape[0]
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        _launch(logits[part], rows[part], num_tokens[part], token_ids, facts, scratch, bias, start)
    return logits


def _launch(
    logits: torch.Tensor, rows: torch.Tensor, num_tokens: torch.Tensor, token_ids: torch.Tensor,
    facts: torch.Tensor | None, scratch: torch.Tensor | None, bias: Bias | None, first: int,
) -> None:  # fmt: skip
    grid, sizes = (len(rows), _SPLITS), (logits.stride(0), token_ids.stride(0), logits.shape[1])
    starts, ids, values = (rows, rows, logits) if bias is None else (bias.starts[first:], bias.ids, bias.values)
    known = (logits, rows, num_tokens, token_ids, logits if facts is None else facts, rows if scratch is None else scratch)
    # Products and sums are rounded one by one, as torch rounds them.
    count[grid](
        *known, starts, ids, values, *sizes, HAS_PENALTIES=facts is not None, HAS_BIAS=bias is not None, SPLITS=_SPLITS,
        BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    if facts is not None:
        apply[grid](*known, *sizes, SPLITS=_SPLITS, BLOCK=_BLOCK, enable_fp_fusion=False)
