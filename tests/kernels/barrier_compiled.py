"""Compiles decode for an AMD GPU as its wrapper launches it; prints what stands before the barrier in front of its count."""

import json

import torch
from kernels.compiling import TARGETS, launches

from llmd_kernels.paged_attention import AttentionCall
from llmd_kernels.paged_attention import triton as attention


def empty(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


call = AttentionCall(
    empty(64, 28, 128, dtype=torch.bfloat16), empty(9, 2, 16, 4, 128, dtype=torch.bfloat16), empty(257, 512),
    empty(64, dtype=torch.int64), empty(65), empty(64), 1, 0.1,
)  # fmt: skip
with launches(TARGETS["gfx942"][0]) as made:
    attention.paged_attention(call, device="gfx942")
(decode,) = [launch for launch in made if launch.name == "decode"]
lines = [line.split(";")[0].strip() for line in decode.built.asm["amdgcn"].splitlines()]
lines = [line for line in lines if line and not line.startswith((".", ";"))]
(count,) = [at for at, line in enumerate(lines) if "atomic_add" in line]
barrier = max(at for at, line in enumerate(lines[:count]) if line.startswith("s_barrier"))
stores = [at for at, line in enumerate(lines[:barrier]) if line.startswith(("global_store", "buffer_store"))]
print(json.dumps({"before the barrier": lines[max(stores) + 1 : barrier]}))
