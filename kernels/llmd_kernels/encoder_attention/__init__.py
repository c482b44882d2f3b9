"""Attention of encoders: every token of a sequence sees every other, or those at most `window` tokens away.

Sequences lie one after another without padding. On a GPU all of them are one launch: with 16-bit tensors as they lie, else
padded to the longest within this one call. Elsewhere each sequence is attended to by itself, and with a window in bands,
so that work grows with the length and not its square.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

_BAND = 256  # queries that share a window's mask
_MAX_PADDING = 8  # padded tokens for each real one, beyond which sequences are better off alone
_VARLEN_ARGUMENTS = {"scale", "window_size", "enable_gqa"}


def encoder_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_start: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """q [T, H, D], k and v [T, K, D], query_start [R+1] int32 on the device, lengths of the R sequences → [T, H, D]."""
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256:
        varlen = _varlen_attention()
        if varlen is not None:
            sides = (-1, -1) if window is None else (window, window)
            longest, shares = max(lengths), q.shape[1] != k.shape[1]
            starts = query_start
            return varlen(q, k, v, starts, starts, longest, longest, scale=scale, window_size=sides, enable_gqa=shares)
    if q.is_cuda and max(lengths) * len(lengths) <= _MAX_PADDING * q.shape[0]:
        return padded_attention(q, k, v, lengths, scale, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        _attend(q[here], k[here], v[here], out[here], scale, window)
        start += length
    return out


@functools.cache
def _varlen_attention() -> Any:
    """torch's attention over sequences without padding, where this torch has it with all that is needed."""
    if not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        found = import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return found if inspect.signature(found).parameters.keys() >= _VARLEN_ARGUMENTS else None


def padded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], scale: float, window: int | None
) -> torch.Tensor:
    """As encoder_attention: one launch over [R, heads, longest, D]."""
    padded = (pad_sequence(list(part.split(list(lengths))), batch_first=True).transpose(1, 2) for part in (q, k, v))
    padded_q, padded_k, padded_v = padded
    position = torch.arange(padded_q.shape[2], device=q.device)
    is_real = position < torch.tensor(lengths, device=q.device)[:, None]  # [R, L]
    mask = is_real[:, None, None, :]
    if window is not None:  # a padding query may see any real key: rows of nothing but -inf give NaN
        near = (position[:, None] - position).abs() <= window
        mask = mask & (near | ~is_real[:, None, :, None])
    shares = q.shape[1] != k.shape[1]
    mixed = F.scaled_dot_product_attention(padded_q, padded_k, padded_v, attn_mask=mask, scale=scale, enable_gqa=shares)
    return mixed.transpose(1, 2)[is_real]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float, window: int | None) -> None:
    """One sequence [L, heads, D] into `out`."""
    length = q.shape[0]
    if window is None or length <= window + 1:
        out.copy_(_sdpa(q, k, v, None, scale))
        return
    for first in range(0, length, _BAND):
        last = min(first + _BAND, length)
        begin, end = max(0, first - window), min(length, last + window)
        queries = torch.arange(first, last, device=q.device)[:, None]
        keys = torch.arange(begin, end, device=q.device)[None]
        mask = (queries - keys).abs() <= window
        out[first:last] = _sdpa(q[first:last], k[begin:end], v[begin:end], mask, scale)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    shares_heads = q.shape[1] != k.shape[1]
    q, k, v = q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=shares_heads)
    return mixed[0].transpose(0, 1)
