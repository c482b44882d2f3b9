"""logit_bias, then repetition, frequency and presence penalties by each row's own tokens: two launches for all rows.

Only tokens that a row has, or has a bias for, are touched. Counts are taken from its tokens anew each time, in a scratch
that is clean again afterwards: nothing is kept between steps that preemption or a dropped token could make wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmd_kernels.penalties import reference

MAX_SCRATCH_BYTES = 64 << 20


class Bias(NamedTuple):
    """Numbers to add to logits; the ids of a row are distinct and within the vocabulary."""

    starts: torch.Tensor  # [R + 1] int32, where a row's entries begin
    ids: torch.Tensor  # [N] int64
    values: torch.Tensor  # [N] float32


def new_scratch(max_num_rows: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """What counts are taken in: zeros, as large as the rows need but no larger than a bound; more rows take turns."""
    num_rows = min(max_num_rows, max(1, MAX_SCRATCH_BYTES // (4 * vocab_size)))
    return torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)


def penalise(
    logits: torch.Tensor,
    rows: torch.Tensor,
    num_tokens: torch.Tensor,
    token_ids: torch.Tensor,
    facts: torch.Tensor | None,
    scratch: torch.Tensor | None = None,
    bias: Bias | None = None,
) -> torch.Tensor:
    """Change logits [R, V] float32 in place and return them.

    rows [R] int64 are lines of token_ids [L, M] int32 and of facts [L, 4] float32: prompt tokens, repetition, frequency and
    presence penalty (1, 0, 0: none). num_tokens [R] int64 says how many of a line's tokens count; ids outside the vocabulary
    count nothing. `scratch` is new_scratch's, for these lines. Raises ValueError for logits that are no float32 matrix.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or rows.shape != logits.shape[:1]:
        raise ValueError(f"penalise wants float32 logits [R, V] and R rows, got {logits.dtype} {tuple(logits.shape)}")
    if logits.is_cuda and logits.stride(1) == 1:
        from llmd_kernels.penalties import triton

        return triton.penalise(logits, rows, num_tokens, token_ids, facts, scratch, bias)
    return reference.penalise(logits, rows, num_tokens, token_ids, facts, bias)
