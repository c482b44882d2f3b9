"""Attention for GPUs of NVIDIA and AMD: Triton kernels over the paged cache, heads turned and stored in one launch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from llmd.api.v1 import AttentionBackendSpec, AttentionNeeds, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from llmd.api.v1 import AttentionBackend, AttentionExtras, Batch, HeadTurn
    from llmd_kernels.quantized_kv import LayerKV

_DTYPES = ("float32", "float16", "bfloat16")
_MAX_HEAD_DIM = 256


class TritonAttention:
    """Split decode and prefill in blocks of queries; windows, soft caps, sinks, ALiBi; a cache of 16, 32 or eight bits."""

    turns_heads = True

    def why_not(self, needs: AttentionNeeds) -> list[str]:
        reasons = []
        if needs.device != "cuda":
            reasons.append(f"only for GPUs, not {needs.device}")
        elif find_spec("triton") is None:
            reasons.append("triton is not installed")
        elif old := _too_old():
            reasons.append(f"needs sm_80 or newer, not {old}")
        if needs.dtype not in _DTYPES:
            reasons.append(f"no dtype {needs.dtype}")
        if needs.head_dim > _MAX_HEAD_DIM:
            reasons.append(f"head_dim {needs.head_dim} is above {_MAX_HEAD_DIM}")
        if needs.kv_cache_dtype not in ("auto", *_DTYPES, "int8", "fp8"):
            reasons.append(f"no kv_cache_dtype {needs.kv_cache_dtype}")
        return reasons

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
        from llmd_kernels.paged_attention import AttentionCall, paged_attention
        from llmd_kernels.store_kv import rotary_store_kv, store_kv

        if turn is None:
            store_kv(k, v, kv, meta.slot_mapping)
        else:
            rotary_store_kv(q, k, v, kv, turn.positions, meta.slot_mapping, turn.cos_sin, turn.norms)
        call = AttentionCall(
            q, kv, meta.block_tables[0], meta.rows, meta.query_start, meta.seq_lens, meta.max_query_len, scale, window,
            *(extras or ()),
        )  # fmt: skip
        return paged_attention(call)


def _too_old() -> str | None:
    """The device's name if its generation lacks what the kernels are compiled to."""
    import torch

    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" if major < 8 else None


def _build() -> AttentionBackend:
    return TritonAttention()


@hookimpl
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    return [AttentionBackendSpec(name="triton", summary="Triton kernels for NVIDIA and AMD", build=_build, priority=60)]
