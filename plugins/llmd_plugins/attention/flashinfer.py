"""Attention by FlashInfer: prompts by its paged prefill kernels for Ampere or Hopper, decodes by llmd's.

Keys and values are read where they lie: the layout is its NHD, [num_blocks, 2, block_size, K, D] with any stride between
blocks (releases before 0.6.0 counted Hopper's places in 32 bits from the begin of the cache, which a whole pool exceeds).
Windows and soft caps are part of a plan. Sinks reach only kernels for Blackwell, ALiBi has slopes of its own, an eight-bit
cache one scale for all: none of these is what models here ask.

`plan` cannot be captured, so steps that only decode never come here. It writes to pinned memory of the wrapper, which is
copied when the device comes to it: two wrappers take turns, as two steps are in flight.

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
        self._wrappers: dict[Plan, list[Any]] = {}  # two of each: the next one's turn is at the end

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
        wrappers = self._wrappers.get(plan) or self._two(plan, call)
        wrappers.append(wrapper := wrappers.pop(0))
        heads, (block_size, kv_heads, head_dim) = call.q.shape[1], call.kv.shape[2:]
        wrapper.plan(
            places.query_start, places.block_start, places.blocks, places.last_block_len,
            heads, kv_heads, head_dim, block_size,
            causal=True, sm_scale=plan.scale, window_left=plan.window_left, logits_soft_cap=plan.soft_cap,
            q_data_type=call.q.dtype, kv_data_type=call.q.dtype,
        )  # fmt: skip
        return wrapper

    def _two(self, plan: Plan, call: AttentionCall) -> list[Any]:
        import torch
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        if self._workspace is None:
            self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=call.q.device)
        self._wrappers[plan] = [BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD") for _ in range(2)]
        return self._wrappers[plan]


def _places(call: AttentionCall, step: LibraryStep) -> Places:
    """Reckoned on the host, where a step's lengths are known; nothing waits for the device."""
    import numpy as np

    from llmd.api.v1 import to_device

    assert step.batch.host_lens is not None
    starts, counts = step.batch.host_lens
    lengths, block_size = starts + counts, call.kv.shape[2]
    num_blocks = -(-lengths // block_size)
    ends = num_blocks.cumsum()
    row = np.repeat(np.arange(len(ends)), num_blocks)
    place = np.arange(len(row)) - np.repeat(ends - num_blocks, num_blocks)
    index = to_device([row, place], np.int64, call.q.device)
    blocks = step.block_table(call)[index[0], index[1]]
    columns = ([0, *counts.cumsum()], [0, *ends], (lengths - 1) % block_size + 1)
    query_start, block_start, last = (_on_host(column, call.q) for column in columns)
    return Places(query_start, block_start, last, blocks)


def _on_host(column: Any, like: Tensor) -> Tensor:
    """int32, where a copy to the device does not wait."""
    import torch

    host = torch.tensor(column, dtype=torch.int32)
    return host.pin_memory() if like.is_cuda else host


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
