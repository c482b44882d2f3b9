"""Attention by FlashInfer: prompts by its paged prefill kernels for Ampere or Hopper, decodes by llmd's.

Keys and values are read where they lie: the layout is its NHD, [num_blocks, 2, block_size, K, D] with any stride between
blocks (releases before 0.6.0 counted Hopper's places in 32 bits from the begin of the cache, which a whole pool exceeds).
Windows and soft caps are part of a plan. Sinks reach only kernels for Blackwell, ALiBi has slopes of its own, an eight-bit
cache one scale for all: none of these is what models here ask.

`plan` needs lengths on the host and cannot be captured, so each step with a prompt waits for the device once, and steps that
only decode never come here.

Written against flashinfer-ai/flashinfer 0.6.0 to 0.6.18: flashinfer/prefill.py, csrc/batch_prefill.cu and
csrc/batch_prefill_sm90.cu.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmd.api.v1 import AttentionBackendSpec, AttentionLimits, hookimpl, missing_release

if TYPE_CHECKING:
    from torch import Tensor

    from llmd.api.v1 import AttentionBackend, LibraryStep
    from llmd_kernels.paged_attention import AttentionCall

_DEFAULT_HOME = "/usr/local/cuda"  # of the compiler, where no variable says another
_WORKSPACE_BYTES = 128 << 20  # as its documents advise; for splits of long rows


class Plan(NamedTuple):
    """What layers of a model may differ in, as `plan` takes it."""

    scale: float
    window_left: int  # tokens before the query; -1: all
    soft_cap: float  # 0: none


class Places(NamedTuple):
    """The rows of a step: three columns on the host, and the blocks one row behind the other on the device."""

    query_start: Tensor  # [R+1] int32
    block_start: Tensor  # [R+1] int32
    last_block_len: Tensor  # [R] int32, tokens in each row's last block
    blocks: Tensor  # [block_start[-1]] int32


class FlashInfer:
    """BatchPrefillWithPagedKVCacheWrapper, one for each kind of layer."""

    name = "flashinfer"
    limits = AttentionLimits(
        device="cuda", nvidia_only=True, oldest=(8, 0), dtypes=("float16", "bfloat16"), head_dims=(64, 128, 256),
        has_sinks=False, has_alibi=False,
    )  # fmt: skip
    can_decode = False

    def __init__(self) -> None:
        self._workspace: Tensor | None = None  # layers run one after another and share it
        self._wrappers: dict[Plan, Any] = {}

    def missing(self) -> list[str]:
        return missing_release("flashinfer-python", "0.6.0") or _no_kernels()

    def attend(self, call: AttentionCall, step: LibraryStep) -> Tensor:
        import torch

        plan = Plan(call.scale, -1 if call.window is None else call.window - 1, call.soft_cap or 0.0)
        wrapper = step.once(plan, lambda: self._planned(plan, call, step))
        out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        wrapper.run(call.q, step.planes(call), out=out)
        return out

    def _planned(self, plan: Plan, call: AttentionCall, step: LibraryStep) -> Any:
        """A wrapper that knows this step's rows."""
        places = step.once("places", lambda: _places(call, step))
        wrapper = self._wrappers.get(plan) or self._wrapper(plan, call)
        heads, (block_size, kv_heads, head_dim) = call.q.shape[1], call.kv.shape[2:]
        wrapper.plan(
            places.query_start, places.block_start, places.blocks, places.last_block_len,
            heads, kv_heads, head_dim, block_size,
            causal=True, sm_scale=plan.scale, window_left=plan.window_left, logits_soft_cap=plan.soft_cap,
            q_data_type=call.q.dtype, kv_data_type=call.q.dtype,
        )  # fmt: skip
        return wrapper

    def _wrapper(self, plan: Plan, call: AttentionCall) -> Any:
        import torch
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        if self._workspace is None:
            self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=call.q.device)
        self._wrappers[plan] = BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        return self._wrappers[plan]


def _places(call: AttentionCall, step: LibraryStep) -> Places:
    """The one wait of a step: lengths are read from the device, and from them follow all sizes."""
    import torch

    block_size = call.kv.shape[2]
    ends, lengths = torch.stack((call.query_start[1:], call.seq_lens)).cpu()
    starts = torch.zeros(2, len(ends) + 1, dtype=torch.int32)
    starts[0, 1:] = ends
    starts[1, 1:] = ((lengths + block_size - 1) // block_size).cumsum(0)
    num_blocks = (call.seq_lens + block_size - 1) // block_size
    total = int(starts[1, -1])
    row = torch.repeat_interleave(num_blocks, output_size=total)
    first = num_blocks.cumsum(0) - num_blocks
    place = torch.arange(total, device=row.device) - first[row]
    return Places(starts[0], starts[1], (lengths - 1) % block_size + 1, step.block_table(call)[row, place])


def _no_kernels() -> list[str]:
    """Its kernels come compiled in a wheel of their own, or are compiled by nvcc when first used."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _DEFAULT_HOME]
    has_compiler = shutil.which("nvcc") or any(home and Path(home, "bin", "nvcc").is_file() for home in homes)
    if find_spec("flashinfer_jit_cache") or has_compiler:
        return []
    return ["neither flashinfer-jit-cache nor nvcc is installed, one of which its kernels come from"]


def _build() -> AttentionBackend:
    from llmd.api.v1 import LibraryAttention

    return LibraryAttention(FlashInfer())


@hookimpl
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    summary = "prompts by FlashInfer, where installed"
    return [AttentionBackendSpec(name="flashinfer", summary=summary, build=_build, priority=40)]
