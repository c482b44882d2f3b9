"""Attention for GPUs of NVIDIA and AMD: Triton kernels over the paged cache, heads turned and stored in one launch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from llmd.api.v1 import AttentionBackendSpec, AttentionLimits, AttentionNeeds, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from llmd.api.v1 import AttentionBackend, AttentionExtras, Batch, HeadTurn
    from llmd_kernels.quantized_kv import LayerKV

_DTYPES = ("float32", "float16", "bfloat16")
_LIMITS = AttentionLimits(
    device="cuda", oldest=(8, 0), dtypes=_DTYPES, max_head_dim=256, kv_cache_dtypes=("auto", *_DTYPES, "int8", "fp8")
)


class TritonAttention:
    """Split decode and prefill in blocks of queries; windows, soft caps, sinks, ALiBi; a cache of 16, 32 or eight bits."""

    turns_heads = True

    def why_not(self, needs: AttentionNeeds) -> list[str]:
        if needs.device == "cuda" and find_spec("triton") is None:
            return ["triton is not installed"]
        return _LIMITS.why_not(needs)

    def kv_shape(self, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (2, block_size, num_kv_heads, head_dim)

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: LayerKV,
        meta: Batch,
        *,
        scale: float,
        window: int | None,
        extras: AttentionExtras | None = None,
        turn: HeadTurn | None = None,
    ) -> Tensor:
        from llmd.api.v1 import stored_call
        from llmd_kernels.paged_attention import paged_attention

        return paged_attention(stored_call(q, k, v, kv, meta, scale=scale, window=window, extras=extras, turn=turn))


def _build() -> AttentionBackend:
    return TritonAttention()


@hookimpl
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    return [AttentionBackendSpec(name="triton", summary="Triton kernels for NVIDIA and AMD", build=_build, priority=60)]
