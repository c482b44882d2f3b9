"""Attention for CPUs: a paged C++ kernel where a compiler is at hand, else torch's own with the GQA group folded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import AttentionBackendSpec, AttentionLimits, AttentionNeeds, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from llmd.api.v1 import AttentionBackend, AttentionExtras, Batch, HeadTurn
    from llmd_kernels.quantized_kv import LayerKV

_LIMITS = AttentionLimits(device="cpu", kv_cache_dtypes=("auto", "float32", "bfloat16", "int8", "fp8"))


class CpuAttention:
    """float32 accumulation; a cache of bfloat16, float32 or eight bits; windows, soft caps, sinks, ALiBi."""

    turns_heads = True

    def __init__(self) -> None:
        from llmd_kernels.paged_attention import AttentionCall, paged_attention
        from llmd_kernels.store_kv import rotary_store_kv, store_kv

        self._store, self._turn, self._attend, self._call = store_kv, rotary_store_kv, paged_attention, AttentionCall

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
        turn: HeadTurn | None = None,
    ) -> Tensor:
        if turn is None:
            self._store(k, v, kv, meta.slot_mapping)
        else:
            self._turn(q, k, v, kv, turn.positions, meta.slot_mapping, turn.cos_sin, turn.norms)
        call = self._call(
            q, kv, meta.block_tables[0], meta.rows, meta.query_start, meta.seq_lens, meta.max_query_len, scale, window,
            *(extras or ()),
        )  # fmt: skip
        return self._attend(call)


def _build() -> AttentionBackend:
    return CpuAttention()


@hookimpl
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    return [AttentionBackendSpec(name="cpu", summary="paged C++ kernel, or torch's SDPA", build=_build, priority=50)]
