"""flash_attn, flash_attn_interface, flashinfer and torch's varlen_attn in plain torch, as strict as their documents.

What they do not document is a TypeError or an AssertionError, so that an adapter that passes here speaks their language.
"""

import sys
from importlib import metadata
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import torch

PAGE_MULTIPLE = 256  # of flash-attn 2 and torch
HALVES = (torch.float16, torch.bfloat16)


def attend(q, k, v, scale, *, left=-1, right=-1, soft_cap=0.0, slopes=None):
    """q [N, H, D], the last N of the tokens that k and v [L, K, D] are of; a window counts tokens to either side."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q.float(), keys) * scale
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    distance = torch.arange(len(k) - len(q), len(k)).unsqueeze(1) - torch.arange(len(k))
    if slopes is not None:
        scores = scores - slopes.view(-1, 1, 1) * distance.abs()
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, values).to(q.dtype)


def by_rows(q, bounds, pages, lengths, **options):
    """[T, H, D]; `pages`: of each row its keys and values, whole blocks one behind the other."""
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    for i, length in enumerate(lengths):
        keys, values = (x[:length] for x in pages[i])
        out[bounds[i] : bounds[i + 1]] = attend(q[bounds[i] : bounds[i + 1]], keys, values, **options)
    return out


def paged(k, v, table, lengths):
    """Of each row the blocks that hold it."""
    size = k.shape[1]
    held = [table[i, : -(-length // size)].long() for i, length in enumerate(lengths)]
    return [(k[blocks].flatten(0, 1), v[blocks].flatten(0, 1)) for blocks in held]


def check_heads(q, k, v):
    assert q.dtype in HALVES
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert k.shape == v.shape
    assert k.dim() == 4
    assert q.shape[-1] == k.shape[-1] <= 256
    assert q.shape[-1] % 8 == 0
    assert q.shape[-2] % k.shape[2] == 0


def check_column(column, length):
    assert column.dtype == torch.int32
    assert column.shape == (length,)
    assert column.is_contiguous()


def check_table(table, num_rows):
    assert table.dtype == torch.int32
    assert table.stride(-1) == 1
    assert table.dim() == 2
    assert len(table) == num_rows


def check_slopes(slopes, num_heads):
    assert slopes is None or (slopes.dtype == torch.float32 and slopes.shape == (num_heads,))


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """flash-attn 2."""
    num_rows = len(cu_seqlens_q) - 1
    check_heads(q, k, v)
    check_column(cu_seqlens_q, num_rows + 1)
    check_column(cu_seqlens_k, num_rows + 1)
    check_table(block_table, num_rows)
    check_slopes(alibi_slopes, q.shape[1])
    assert q.dim() == 3
    assert k.shape[1] % PAGE_MULTIPLE == 0
    lengths = cu_seqlens_k.diff().tolist()
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    assert max_seqlen_k >= max(lengths)
    assert (dropout_p, deterministic, return_attn_probs, causal) == (0.0, False, False, True)
    return by_rows(
        q, cu_seqlens_q.tolist(), paged(k, v, block_table, lengths), lengths, scale=softmax_scale, left=window_size[0],
        right=0, soft_cap=softcap, slopes=alibi_slopes,
    )  # fmt: skip


def flash_attn_with_kvcache_2(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """flash-attn 2: every row has as many queries."""
    assert (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad) == (None,) * 6
    assert (rotary_interleaved, num_splits, return_softmax_lse, causal) == (True, 0, False, True)
    num_rows, count, num_heads, _ = q.shape
    check_heads(q, k_cache, v_cache)
    check_column(cache_seqlens, num_rows)
    check_table(block_table, num_rows)
    check_slopes(alibi_slopes, num_heads)
    assert k_cache.shape[1] % PAGE_MULTIPLE == 0
    lengths = cache_seqlens.tolist()
    bounds = [i * count for i in range(num_rows + 1)]
    return by_rows(
        q.flatten(0, 1), bounds, paged(k_cache, v_cache, block_table, lengths), lengths, scale=softmax_scale,
        left=window_size[0], right=0, soft_cap=softcap, slopes=alibi_slopes,
    ).view(q.shape)  # fmt: skip


def flash_attn_with_kvcache_3(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    """flash-attn 3: blocks of any size."""
    unused = (k, v, qv, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, cu_seqlens_k_new, rotary_seqlens)
    assert unused == (None,) * 9
    assert (q_descale, k_descale, v_descale, scheduler_metadata, pack_gqa) == (None,) * 5
    assert (attention_chunk, rotary_interleaved, num_splits, sm_margin, return_softmax_lse) == (0, True, 0, 0, False)
    num_rows = len(cu_seqlens_q) - 1
    check_heads(q, k_cache, v_cache)
    check_column(cu_seqlens_q, num_rows + 1)
    check_column(cache_seqlens, num_rows)
    check_table(page_table, num_rows)
    assert q.dim() == 3
    assert causal
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    lengths = cache_seqlens.tolist()
    return by_rows(
        q, cu_seqlens_q.tolist(), paged(k_cache, v_cache, page_table, lengths), lengths, scale=softmax_scale,
        left=window_size[0], right=0, soft_cap=softcap,
    )  # fmt: skip


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """torch 2.13 with its own kernels."""
    num_rows = len(cu_seq_q) - 1
    check_heads(query, key, value)
    check_column(cu_seq_q, num_rows + 1)
    check_column(cu_seq_k, num_rows + 1)
    check_column(seqused_k, num_rows)
    check_table(block_table, num_rows)
    assert key.shape[1] % PAGE_MULTIPLE == 0
    assert enable_gqa or query.shape[1] == key.shape[2]
    assert (return_aux, num_splits) == (None, 1)
    lengths = seqused_k.tolist()
    assert max_q >= int(cu_seq_q.diff().max())
    assert max_k >= max(lengths)
    return by_rows(
        query, cu_seq_q.tolist(), paged(key, value, block_table, lengths), lengths, scale=scale, left=window_size[0],
        right=window_size[1],
    )  # fmt: skip


class BatchPrefillWithPagedKVCacheWrapper:
    """flashinfer, without CUDA graphs."""

    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None, paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None, mask_indptr_buf=None,
        backend="auto", jit_args=None, jit_kwargs=None,
    ):  # fmt: skip
        assert (kv_layout, use_cuda_graph, backend, jit_args) == ("NHD", False, "auto", None)
        assert float_workspace_buffer.dtype == torch.uint8
        self.planned = None

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        num_rows = len(qo_indptr) - 1
        check_column(qo_indptr, num_rows + 1)
        check_column(paged_kv_indptr, num_rows + 1)
        check_column(paged_kv_indices, int(paged_kv_indptr[-1]))
        check_column(paged_kv_last_page_len, num_rows)
        assert ((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all()
        assert (head_dim_vo, custom_mask, packed_custom_mask, rope_scale, rope_theta) == (None,) * 5
        assert (pos_encoding_mode, use_fp16_qk_reduction, causal) == ("NONE", False, True)
        assert head_dim_qk in (64, 128, 256)
        bounds = paged_kv_indptr.tolist()
        self.planned = SimpleNamespace(
            bounds=qo_indptr.tolist(),
            blocks=[paged_kv_indices[a:b].long() for a, b in pairwise(bounds)],
            last=paged_kv_last_page_len.tolist(), shape=(num_qo_heads, num_kv_heads, head_dim_qk, page_size),
            scale=sm_scale, left=window_left, soft_cap=logits_soft_cap or 0.0, dtypes=(q_data_type, kv_data_type),
        )  # fmt: skip

    def run(
        self, q, paged_kv_cache, *args, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False, enable_pdl=None,
        window_left=None,
    ):  # fmt: skip
        k, v = paged_kv_cache
        plan, size = self.planned, k.shape[1]
        assert (args, k_scale, v_scale, lse, return_lse, enable_pdl, window_left) == ((), *(None,) * 3, False, None, None)
        assert q.dtype in HALVES
        assert plan.dtypes == (q.dtype, k.dtype)
        assert plan.shape == (q.shape[1], k.shape[2], q.shape[2], size)
        assert plan.bounds[-1] == len(q)
        assert k.stride() == v.stride()
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        lengths = [(len(blocks) - 1) * size + last for blocks, last in zip(plan.blocks, plan.last, strict=True)]
        pages = [(k[blocks].flatten(0, 1), v[blocks].flatten(0, 1)) for blocks in plan.blocks]
        limits = {"scale": plan.scale, "left": plan.left, "right": 0, "soft_cap": plan.soft_cap}
        return out.copy_(by_rows(q, plan.bounds, pages, lengths, **limits))


RELEASES = {
    "flash-attn": "2.8.3.post1", "flash_attn_3": "3.0.0", "flashinfer-python": "0.6.18rc7", "torch": "2.13.0+cu130",
}  # fmt: skip


def install(monkeypatch, *, capability=(9, 0), releases=RELEASES):
    """All of them on a machine with a GPU of this generation, as far as anybody asks."""
    modules = {
        "flash_attn": {
            "flash_attn_varlen_func": flash_attn_varlen_func, "flash_attn_with_kvcache": flash_attn_with_kvcache_2,
        },
        "flash_attn_interface": {"flash_attn_with_kvcache": flash_attn_with_kvcache_3},
        "flashinfer": {"BatchPrefillWithPagedKVCacheWrapper": BatchPrefillWithPagedKVCacheWrapper},
    }  # fmt: skip
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    def version(distribution):
        if distribution not in releases:
            raise metadata.PackageNotFoundError(distribution)
        return releases[distribution]

    monkeypatch.setattr("llmd.model.attention_library.version", version)
    monkeypatch.setattr("llmd_plugins.attention.flashinfer.find_spec", lambda name: name == "flashinfer_jit_cache")
