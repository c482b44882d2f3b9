"""One object for all layers of a model. T tokens of R rows, H query heads, K KV heads of size D."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmd.api.v1 import AttentionNeeds, Batch


class Zeta:
    """Gathers a row's keys and values from its blocks, and lets torch attend."""

    def why_not(self, needs: AttentionNeeds) -> list[str]:
        """What it cannot do, told in words to whoever asks for it by name."""
        reasons = []
        if needs.soft_cap is not None:
            reasons.append("no soft cap")
        if needs.has_sinks:
            reasons.append("no attention sinks")
        if needs.has_alibi:
            reasons.append("no ALiBi")
        if needs.kv_cache_dtype not in ("auto", needs.dtype):
            reasons.append(f"no kv_cache_dtype {needs.kv_cache_dtype}")
        return reasons

    def kv_shape(self, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (2, block_size, num_kv_heads, head_dim)

    def prepare(self, batch: Batch) -> Batch:
        return batch  # once a step: what all layers share could be computed here

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, meta: Batch, *, scale: float, window: int | None
    ) -> Tensor:
        block_size = kv.shape[2]
        blocks, offsets = meta.slot_mapping // block_size, meta.slot_mapping % block_size
        kv[blocks, 0, offsets], kv[blocks, 1, offsets] = k.to(kv.dtype), v.to(kv.dtype)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        bounds = meta.query_start.tolist()
        for index, (row, length) in enumerate(zip(meta.rows.tolist(), meta.seq_lens.tolist(), strict=True)):
            span = slice(bounds[index], bounds[index + 1])
            held = kv[meta.block_tables[0][row, : -(-length // block_size)].long()]  # [blocks, 2, block_size, K, D]
            keys, values = (held[:, which].flatten(0, 1)[:length].to(q.dtype) for which in (0, 1))
            out[span] = _attend(q[span], keys, values, scale, window)
        return out


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """The last N tokens q [N, H, D] over keys and values [L, K, D]."""
    length, group = keys.shape[0], q.shape[1] // keys.shape[1]
    place = torch.arange(length - q.shape[0], length, device=q.device).unsqueeze(1)
    other = torch.arange(length, device=q.device)
    mask = other <= place if window is None else (other <= place) & (other > place - window)
    keys, values = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (keys, values))
    return scaled_dot_product_attention(q.transpose(0, 1), keys, values, mask, scale=scale).transpose(0, 1)
