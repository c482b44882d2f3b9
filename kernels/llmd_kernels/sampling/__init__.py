"""From logits to tokens in a few launches whose grids hang on rows and vocabulary alone: greedy, drawn, and drawn from what
top_k, top_p and min_p leave, each row as it wants, with the draw of llmd's own sampler, bit for bit.

    maxima ─► [narrow × 8: top_k] ─► tally ─► [narrow × 8: top_p ─► tally] ─► pick

A token is drawn by one uniform number per row, a hash of the row's seed and its number of tokens, looked up in the sums of
fixed-point weights `floor(exp((x - max) / T) · 2**40)` in the order of token ids. Integers add up to the same in any order,
so neither the splits nor the batch can change a token; ties at a cut all stay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmd_kernels import native
from llmd_kernels.sampling import cpu, reference


class Knobs(NamedTuple):
    """What rows ask for, by their line in the executor's persistent arrays; written when a row is admitted."""

    seeds: torch.Tensor  # [L] int64
    values: torch.Tensor  # [L, 4] float64: 1 / temperature as a float32 (0: greedy), top_k, top_p, min_p as a float32


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    num_tokens: torch.Tensor,
    knobs: Knobs,
    *,
    any_drawn: bool = True,
    any_top_k: bool = True,
    any_top_p: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token [R] int64 for each row of logits [R, V], and its largest logit [R] float32: NaN where there is one.

    rows [R] int64 are lines of `knobs`, num_tokens [R] int64 the draw's counter. The flags say whether any row wants what
    they name: a pass that nobody wants is not launched. A row whose largest logit is not finite gets a meaningless token.
    Raises ValueError for shapes that do not fit.
    """
    if logits.dim() != 2 or not logits.shape[1] or rows.shape != num_tokens.shape or rows.shape != logits.shape[:1]:
        raise ValueError(
            f"sample wants logits [R, V] and two lists [R], got {tuple(logits.shape)}, {tuple(rows.shape)}, "
            f"{tuple(num_tokens.shape)}"
        )
    if logits.is_cuda and logits.stride(1) == 1:
        from llmd_kernels.sampling import triton

        return triton.sample(logits, rows, num_tokens, knobs, any_drawn=any_drawn, any_top_k=any_top_k, any_top_p=any_top_p)
    if native.is_available(logits) and logits.stride(1) == 1:
        return cpu.sample(logits, rows.contiguous(), num_tokens.contiguous(), knobs)
    return reference.sample(logits, rows, num_tokens, knobs)


def deliver(
    tokens: torch.Tensor,
    best: torch.Tensor,
    rows: torch.Tensor,
    num_tokens: torch.Tensor,
    token_ids: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Put what `sample` gave where the next step reads it, token_ids[rows, num_tokens], and into `out`, which is returned.

    out [2, R] int32: the tokens, and the bits of the largest logits. token_ids [L, M] int32, num_tokens [R] int64 below M.
    Raises ValueError for an `out` that does not fit.
    """
    if out.shape != (2, len(tokens)) or out.dtype != torch.int32 or not out.is_contiguous():
        raise ValueError(f"deliver wants contiguous int32 out [2, {len(tokens)}], got {out.dtype} {list(out.shape)}")
    if tokens.is_cuda:
        from llmd_kernels.sampling import triton

        return triton.deliver(tokens, best, rows, num_tokens, token_ids, out)
    return reference.deliver(tokens, best, rows, num_tokens, token_ids, out)
