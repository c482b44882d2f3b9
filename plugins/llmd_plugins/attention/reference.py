"""Attention in plain torch, on any device: slow, and the truth that other backends are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import AttentionBackendSpec, AttentionNeeds, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from llmd.api.v1 import AttentionBackend, Batch


class ReferenceAttention:
    """Row by row, the whole score matrix."""

    def why_not(self, needs: AttentionNeeds) -> list[str]:
        reasons = []
        if needs.soft_cap is not None:
            reasons.append("no soft cap")
        if needs.has_sinks:
            reasons.append("no attention sinks")
        if needs.kv_cache_dtype not in ("auto", "float32", "float16", "bfloat16"):
            reasons.append(f"no kv_cache_dtype {needs.kv_cache_dtype}")
        return reasons

    def kv_shape(self, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (2, block_size, num_kv_heads, head_dim)

    def prepare(self, batch: Batch) -> Any:
        return batch

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, meta: Batch, *, scale: float, window: int | None
    ) -> Tensor:
        from llmd_kernels.paged_attention.reference import paged_attention
        from llmd_kernels.store_kv.reference import store_kv

        store_kv(k, v, kv, meta.slot_mapping)
        return paged_attention(q, kv, meta.block_tables[0], meta.rows, meta.query_start, meta.seq_lens, scale, window)


def _build() -> AttentionBackend:
    return ReferenceAttention()


@hookimpl
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    return [AttentionBackendSpec(name="reference", summary="plain torch, any device", build=_build, priority=0)]
