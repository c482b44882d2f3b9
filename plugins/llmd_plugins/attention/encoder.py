"""Attention for encoders on any device: the whole prompt at once, nothing cached."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llmd.api.v1 import AttentionBackendSpec, AttentionLimits, AttentionNeeds, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from llmd.api.v1 import Batch, EncoderAttentionBackend

_LIMITS = AttentionLimits(kv_cache_dtypes=None, has_soft_cap=False, has_sinks=False, has_alibi=False)


class Lengths(NamedTuple):
    """Where the sequences of a batch begin, on the device and as numbers."""

    query_start: Tensor  # [R+1] int32
    lengths: list[int]


class EncoderAttention:
    """One launch on a GPU, one call a sequence elsewhere."""

    def __init__(self) -> None:
        from llmd_kernels.encoder_attention import encoder_attention

        self._attend = encoder_attention

    def why_not(self, needs: AttentionNeeds) -> list[str]:
        return _LIMITS.of_model(needs)

    def prepare(self, batch: Batch) -> Lengths:
        return Lengths(batch.query_start, batch.seq_lens.tolist())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, meta: Lengths, *, scale: float, window: int | None) -> Tensor:
        return self._attend(q, k, v, meta.query_start, meta.lengths, scale, window)


def _build() -> EncoderAttentionBackend:
    return EncoderAttention()


@hookimpl
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    summary = "whole sequences without a cache, for encoders"
    return [AttentionBackendSpec(name="encoder", summary=summary, build=_build, for_encoders=True)]
