"""Attention for CPUs: a paged C++ kernel where a compiler is at hand, else torch's own with the GQA group folded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import AttentionBackendSpec, AttentionNeeds, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from llmd.api.v1 import AttentionBackend, Batch


class CpuAttention:
    """float32 accumulation, bfloat16 or float32 cache, sliding windows."""

    def __init__(self) -> None:
        from llmd_kernels.paged_attention import paged_attention
        from llmd_kernels.store_kv import store_kv

        self._store, self._attend = store_kv, paged_attention

    def why_not(self, needs: AttentionNeeds) -> list[str]:
        reasons = []
        if needs.device != "cpu":
            reasons.append(f"only for CPUs, not {needs.device}")
        if needs.soft_cap is not None:
            reasons.append("no soft cap")
        if needs.has_sinks:
            reasons.append("no attention sinks")
        if needs.num_heads // needs.num_kv_heads > 128:
            reasons.append("more than 128 query heads a KV head")
        if needs.kv_cache_dtype not in ("auto", "float32", "bfloat16"):
            reasons.append(f"no kv_cache_dtype {needs.kv_cache_dtype}")
        return reasons

    def kv_shape(self, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (2, block_size, num_kv_heads, head_dim)

    def prepare(self, batch: Batch) -> Any:
        return batch

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, meta: Batch, *, scale: float, window: int | None
    ) -> Tensor:
        self._store(k, v, kv, meta.slot_mapping)
        return self._attend(q, kv, meta.block_tables[0], meta.rows, meta.query_start, meta.seq_lens, scale, window)


def _build() -> AttentionBackend:
    return CpuAttention()


@hookimpl
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    return [AttentionBackendSpec(name="cpu", summary="paged C++ kernel, or torch's SDPA", build=_build, priority=50)]
