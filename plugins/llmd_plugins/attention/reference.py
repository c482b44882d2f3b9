"""Attention in plain torch, on any device: slow, and the truth that other backends are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import AttentionBackendSpec, AttentionLimits, AttentionNeeds, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from llmd.api.v1 import AttentionBackend, AttentionExtras, Batch
    from llmd_kernels.quantized_kv import LayerKV

_LIMITS = AttentionLimits(kv_cache_dtypes=("auto", "float32", "float16", "bfloat16", "int8", "fp8"))


class ReferenceAttention:
    """Row by row, the whole score matrix; everything that a model may ask for."""

    def why_not(self, needs: AttentionNeeds) -> list[str]:
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
    ) -> Tensor:
        from llmd_kernels.paged_attention.call import AttentionCall
        from llmd_kernels.paged_attention.reference import paged_attention
        from llmd_kernels.store_kv.reference import store_kv

        store_kv(k, v, kv, meta.slot_mapping)
        call = AttentionCall(
            q, kv, meta.block_tables[0], meta.rows, meta.query_start, meta.seq_lens, meta.max_query_len, scale, window,
            *(extras or ()),
        )  # fmt: skip
        call.check()
        return paged_attention(call)


def _build() -> AttentionBackend:
    return ReferenceAttention()


@hookimpl
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    return [AttentionBackendSpec(name="reference", summary="plain torch, any device", build=_build, priority=0)]
