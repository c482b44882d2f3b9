"""Attention by flash-attn, release 2 (Ampere and later) and release 3 (Hopper): prompts by the library, decodes by llmd.

Both take keys and values with any stride between blocks, so a layer's view of the pool is handed over as it is. Windows and
soft caps are known to both. Release 2 reads blocks of 256 tokens or a multiple, and has ALiBi; release 3 reads blocks of any
size. Neither knows sinks, nor the scales of an eight-bit cache.

Written against the interfaces and checks of Dao-AILab/flash-attention: flash_attn/flash_attn_interface.py and
csrc/flash_attn/flash_api.cpp of 2.6.0 to 2.8.3 (`block_table` of `flash_attn_varlen_func` came with 2.5.7, `softcap` with
2.6.0); hopper/flash_attn_interface.py and hopper/flash_api.cpp of 3.0.0.b1 and 3.0.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import AttentionBackendSpec, AttentionLimits, hookimpl, missing_release

if TYPE_CHECKING:
    from torch import Tensor

    from llmd.api.v1 import AttentionBackend, LibraryStep
    from llmd_kernels.paged_attention import AttentionCall

_LIMITS: dict[str, Any] = {
    "device": "cuda", "nvidia_only": True, "dtypes": ("float16", "bfloat16"), "max_head_dim": 256, "head_dim_multiple": 8,
    "has_sinks": False,
}  # fmt: skip


class FlashAttention2:
    """The package flash_attn."""

    name = "flash_attn"
    limits = AttentionLimits(oldest=(8, 0), block_multiple=256, **_LIMITS)
    can_decode = True

    def missing(self) -> list[str]:
        return missing_release("flash-attn", "2.6.0")

    def attend(self, call: AttentionCall, step: LibraryStep) -> Tensor:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        keys, values = step.planes(call)
        options = {**_options(call), "alibi_slopes": call.alibi_slopes, "block_table": step.block_table(call)}
        if call.max_query_len > 1:
            lengths = (call.query_start, step.key_start(call), call.max_query_len, step.batch.max_seq_len)
            return flash_attn_varlen_func(call.q, keys, values, *lengths, **options)
        queries = call.q.unsqueeze(1)  # [R, 1, H, D]
        return flash_attn_with_kvcache(queries, keys, values, cache_seqlens=call.seq_lens, **options).squeeze(1)


class FlashAttention3:
    """The module flash_attn_interface of the distribution flash_attn_3."""

    name = "flash_attn_3"
    limits = AttentionLimits(oldest=(9, 0), newest=(9, 0), has_alibi=False, **_LIMITS)
    can_decode = True

    def missing(self) -> list[str]:
        return missing_release("flash_attn_3", "3.0.0")

    def attend(self, call: AttentionCall, step: LibraryStep) -> Tensor:
        from flash_attn_interface import flash_attn_with_kvcache

        keys, values = step.planes(call)
        return flash_attn_with_kvcache(
            call.q, keys, values, cache_seqlens=call.seq_lens, page_table=step.block_table(call),
            cu_seqlens_q=call.query_start, max_seqlen_q=call.max_query_len, **_options(call),
        )  # fmt: skip


def _options(call: AttentionCall) -> dict[str, Any]:
    """What both releases call the same. Their window counts tokens before the query, without itself."""
    window = (-1, -1) if call.window is None else (call.window - 1, 0)
    return {"softmax_scale": call.scale, "causal": True, "window_size": window, "softcap": call.soft_cap or 0.0}


def _build_2() -> AttentionBackend:
    from llmd.api.v1 import LibraryAttention

    return LibraryAttention(FlashAttention2())


def _build_3() -> AttentionBackend:
    from llmd.api.v1 import LibraryAttention

    return LibraryAttention(FlashAttention3())


@hookimpl
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    return [
        AttentionBackendSpec(
            name="flash_attn", summary="prompts by flash-attn 2, where installed", build=_build_2, priority=40
        ),
        AttentionBackendSpec(
            name="flash_attn_3", summary="prompts by flash-attn 3, where installed", build=_build_3, priority=40
        ),
    ]
