"""Attention by torch's own flash attention, `torch.nn.attention.varlen`: prompts by torch, decodes by llmd's kernels.

It takes keys and values with any stride between blocks of 256 tokens or a multiple, and windows; soft caps, sinks and ALiBi
have no argument. The splits of a row's keys are fixed at one: what joins several counts on equally many queries in each row.

Written against torch 2.13.0: the docstring of `varlen_attn`, and the checks of `mha_varlen_fwd` in
aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, which wants `cu_seq_k` beside `seqused_k`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from llmd.api.v1 import AttentionBackendSpec, AttentionLimits, hookimpl, missing_release

if TYPE_CHECKING:
    from torch import Tensor

    from llmd.api.v1 import AttentionBackend, LibraryStep
    from llmd_kernels.paged_attention import AttentionCall


class TorchVarlen:
    """torch.nn.attention.varlen.varlen_attn over a block table."""

    name = "torch_varlen"
    limits = AttentionLimits(
        device="cuda", nvidia_only=True, oldest=(8, 0), dtypes=("float16", "bfloat16"), max_head_dim=256,
        head_dim_multiple=8, block_multiple=256, has_soft_cap=False, has_sinks=False, has_alibi=False,
    )  # fmt: skip
    can_decode = True

    def missing(self) -> list[str]:
        return missing_release("torch", "2.13.0") or _not_in_this_build()

    def attend(self, call: AttentionCall, step: LibraryStep) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        keys, values = step.planes(call)
        window = -1 if call.window is None else call.window - 1  # tokens before the query, without itself
        out = varlen_attn(
            call.q, keys, values, call.query_start, step.key_start(call), call.max_query_len, step.batch.max_seq_len,
            scale=call.scale, window_size=(window, 0), enable_gqa=True, seqused_k=call.seq_lens,
            block_table=step.block_table(call), num_splits=1,
        )  # fmt: skip
        return cast("Tensor", out)  # the other kind of answer has to be asked for


def _not_in_this_build() -> list[str]:
    from torch.backends.cuda import is_flash_attention_available
    from torch.nn.attention import current_flash_attention_impl

    if not is_flash_attention_available():
        return ["torch is built without flash attention"]
    other = current_flash_attention_impl()  # which takes other lengths, and blocks of other sizes
    return [f"torch's flash attention was replaced by {other}"] if other else []


def _build() -> AttentionBackend:
    from llmd.api.v1 import LibraryAttention

    return LibraryAttention(TorchVarlen())


@hookimpl
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    summary = "prompts by torch's own flash attention"
    return [AttentionBackendSpec(name="torch_varlen", summary=summary, build=_build, priority=40)]
