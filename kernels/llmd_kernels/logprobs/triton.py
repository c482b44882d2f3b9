"""Parts of a row, each read once and held in registers; then one program a row joins what the parts found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.sampling.triton import ordered

_BLOCK = 4096  # tokens a program holds


@triton.jit
def packed_value(packed):
    """The logit of what `ordered` and a token were packed into, and the token."""
    key = ((packed >> 31) - 0x80000000).to(tl.int32)
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return value, 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@triton.jit(do_not_specialize=("num_top",))
def parts(sums, best, x, at, token_ids, x_stride, width, num_top, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Of a part: largest logit, sum of exponentials below it, tokens above the asked one, and the `num_top` largest."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x += tl.load(at + row) * x_stride
    i = split * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < width, other=float("-inf")).to(tl.float32)
    asked = tl.load(x + tl.load(token_ids + row)).to(tl.float32)
    most = tl.max(value, axis=0)
    place = sums + (row * SPLITS + split) * 3
    tl.store(place, most)
    most = tl.where(most == float("-inf"), 0.0, most)
    tl.store(place + 1, tl.sum(tl.exp(value - most), axis=0))
    tl.store(place + 2, tl.sum((value > asked).to(tl.float32), axis=0))
    packed = tl.where(i < width, (ordered(value) << 31) | (0x7FFFFFFF - i).to(tl.int64), 0)
    for n in range(num_top):
        largest = tl.max(packed, axis=0)
        tl.store(best + (row * SPLITS + split) * num_top + n, largest)
        packed = tl.where(packed == largest, 0, packed)


@triton.jit(do_not_specialize=("num_top",))
def join(
    logprobs, ranks, top_ids, top_logprobs, sums, best, x, at, token_ids, x_stride, num_top,
    SPLITS: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's answers."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK)
    place, is_part = sums + (row * SPLITS + split) * 3, split < SPLITS
    largest = tl.load(place, mask=is_part, other=float("-inf"))
    most = tl.max(largest, axis=0)
    sum_below = tl.load(place + 1, mask=is_part, other=0.0) * tl.exp(largest - most)
    norm = most + tl.log(tl.sum(tl.where(is_part, sum_below, 0.0), axis=0))
    asked = tl.load(x + tl.load(at + row) * x_stride + tl.load(token_ids + row)).to(tl.float32)
    tl.store(logprobs + row, asked - norm)
    tl.store(ranks + row, tl.sum(tl.load(place + 2, mask=is_part, other=0.0).to(tl.int64), axis=0) + 1)
    i = tl.arange(0, CANDIDATES)
    packed = tl.load(best + row * SPLITS * num_top + i, mask=i < SPLITS * num_top, other=0)
    for n in range(num_top):
        found = tl.max(packed, axis=0)
        value, token = packed_value(found)
        tl.store(top_ids + row * num_top + n, token)
        tl.store(top_logprobs + row * num_top + n, value - norm)
        packed = tl.where(packed == found, 0, packed)


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, at: torch.Tensor | None = None, block: int = _BLOCK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in the package; `block` tokens a part, a power of two."""
    num, width, device = token_ids.shape[0], logits.shape[1], logits.device
    num_top, splits = min(num_top, width), triton.cdiv(width, block)
    at = torch.arange(num, device=device) if at is None else at
    logprobs, ranks = (torch.empty(num, dtype=dtype, device=device) for dtype in (torch.float32, torch.int64))
    top_ids, top_logprobs = (torch.empty(num, num_top, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
    if num:
        sums = torch.empty(num * splits * 3, dtype=torch.float32, device=device)
        best = torch.empty(num * splits * max(1, num_top), dtype=torch.int64, device=device)
        parts[(num, splits)](
            sums, best, logits, at, token_ids, logits.stride(0), width, num_top, SPLITS=splits, BLOCK=block, num_warps=8
        )
        join[(num,)](
            logprobs, ranks, top_ids, top_logprobs, sums, best, logits, at, token_ids, logits.stride(0), num_top,
            SPLITS=splits, CANDIDATES=triton.next_power_of_2(splits * max(1, num_top)),
            BLOCK=triton.next_power_of_2(splits), num_warps=8,
        )  # fmt: skip
    return logprobs, ranks, top_ids, top_logprobs
