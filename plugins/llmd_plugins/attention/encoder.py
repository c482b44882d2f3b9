"""Attention for encoders on any device: the whole prompt at once, nothing cached."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llmd.api.v1 import AttentionBackendSpec, AttentionNeeds, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from llmd.api.v1 import Batch, EncoderAttentionBackend


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
        reasons = []
        if needs.soft_cap is not None:
            reasons.append("no soft cap")
        if needs.has_sinks:
            reasons.append("no attention sinks")
        return reasons

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
