"""A barrier of a program's threads that holds for memory, on every GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info


@triton.jit
def full_barrier():
    """What any thread of this program asked of memory is done before any of them goes on.

    NVIDIA's barrier sees to that, with the fence of an atomic that follows for other programs. AMD's waits for threads only:
    loads and stores may still be on their way, and such a fence waits for those of its own wave.
    """
    if target_info.is_hip():
        i = tl.arange(0, 64)  # in every wave
        tl.inline_asm_elementwise("s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [i], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
