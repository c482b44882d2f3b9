"""Copy whole blocks of the KV pool, all layers at once: a sequence goes on from another's partly filled block."""

from __future__ import annotations

import torch

from llmd_kernels.copy_blocks import reference

_WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)
_MAX_BLOCK_BYTES = 1 << 29  # a grid's second dimension ends at 65,535


def copy_blocks(pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """pool[targets[i]] = pool[sources[i]] for pool [num_blocks, ...], contiguous, of any dtype: its bits are copied.

    sources, targets: [N] int64 on the pool's device. Targets are distinct and none is a source: copies run in any order.
    Ids must lie within the pool: on a GPU nobody looks, as that would wait for the device; on a CPU torch raises IndexError.
    Raises ValueError, before anything is launched, for shapes, dtypes and devices that do not fit.
    """
    if pool.dim() < 2 or not pool.is_contiguous():
        raise ValueError(f"copy_blocks wants a contiguous pool [num_blocks, ...], got {list(pool.shape)}, {pool.stride()}")
    if sources.dim() != 1 or sources.shape != targets.shape:
        raise ValueError(f"copy_blocks wants as many sources as targets, got {list(sources.shape)}, {list(targets.shape)}")
    for name, ids in (("sources", sources), ("targets", targets)):
        if ids.dtype != torch.int64 or not ids.is_contiguous() or ids.device != pool.device:
            raise ValueError(f"copy_blocks wants contiguous int64 {name} on {pool.device}, got {ids.dtype} on {ids.device}")
    if not sources.numel() or not pool.numel():
        return
    words = as_words(pool)
    if words.stride(0) * words.itemsize > _MAX_BLOCK_BYTES:
        raise ValueError(f"copy_blocks takes blocks of up to {_MAX_BLOCK_BYTES} bytes, got {words[0].nbytes}")
    if pool.is_cuda:
        from llmd_kernels.copy_blocks import triton

        triton.copy_blocks(words, sources, targets)
    else:
        reference.copy_blocks(words, sources, targets)


def as_words(pool: torch.Tensor) -> torch.Tensor:
    """The same memory as [num_blocks, W] of the widest integers that a block is made of."""
    block_bytes = pool[0].nbytes
    word = next(word for word in _WORDS if block_bytes % word.itemsize == 0)
    return pool.view(pool.shape[0], -1).view(word)
