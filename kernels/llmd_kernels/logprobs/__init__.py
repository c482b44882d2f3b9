"""Log-probability and rank of one token of each row, and the likeliest tokens, without a softmax of whole rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmd_kernels.logprobs import reference


class TokenLogprobs(NamedTuple):
    """For P positions; of equal logits the smaller id comes first."""

    logprobs: torch.Tensor  # [P] float32
    ranks: torch.Tensor  # [P] int64, 1 + how many tokens are likelier
    top_ids: torch.Tensor  # [P, n] int64
    top_logprobs: torch.Tensor  # [P, n] float32


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, at: torch.Tensor | None = None
) -> TokenLogprobs:
    """Of token_ids [P] int64 in lines `at` [P] int64 of logits [R, V], or in all of them; n is num_top or V.

    Raises ValueError for shapes that do not fit.
    """
    lines = logits.shape[0] if at is None else at.shape[0]
    if logits.dim() != 2 or token_ids.shape != (lines,) or num_top < 0:
        raise ValueError(f"token_logprobs wants {lines} tokens of logits [R, V], got {tuple(token_ids.shape)}, n {num_top}")
    if logits.is_cuda and logits.stride(1) == 1:
        from llmd_kernels.logprobs import triton

        return TokenLogprobs(*triton.token_logprobs(logits, token_ids, num_top, at))
    return TokenLogprobs(*reference.token_logprobs(logits, token_ids, num_top, at))
