"""A part of one block a program: the grid is copies × parts of a block, whatever the blocks hold.

Ids are specialised on nothing, and what a block measures is a constant: a model has one kernel, and its addresses are
multiples of 16 bytes wherever a block is, so that words move two at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048  # words of a program


@triton.jit(do_not_specialize_on_alignment=("sources", "targets"))
def copy_words(pool, sources, targets, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """pool[targets[i]] = pool[sources[i]], blocks of WORDS."""
    number = tl.program_id(0)
    source, target = tl.load(sources + number), tl.load(targets + number)  # int64, and so are addresses
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(pool + source * WORDS + i, mask=i < WORDS)
    tl.store(pool + target * WORDS + i, words, mask=i < WORDS)


def copy_blocks(words: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """words [num_blocks, W], contiguous, of any integers; sources and targets [N] int64."""
    size = words.shape[1]
    grid = (sources.shape[0], triton.cdiv(size, BLOCK))
    copy_words[grid](words, sources, targets, WORDS=size, BLOCK=BLOCK)
