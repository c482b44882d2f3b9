"""Attention backends against plain attention: random shapes, chunks of prompts beside decodes, scattered blocks."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmd.api.v1 import AttentionBackend, AttentionNeeds
from llmd.api.v1.testing.compare import require, require_close
from llmd.api.v1.testing.paged import PagedRows


class Shape(NamedTuple):
    """One case of the fuzz."""

    head_dim: int
    num_kv_heads: int
    group: int  # query heads a KV head
    block_size: int
    window: int | None
    lens: tuple[int, ...]  # tokens of each row
    cuts: tuple[int, ...]  # of which so many are computed a step earlier

    def needs(self, device: str, dtype: torch.dtype) -> AttentionNeeds:
        """What a model of this shape asks."""
        return AttentionNeeds(
            device=device,
            dtype=str(dtype).removeprefix("torch."),
            head_dim=self.head_dim,
            num_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            block_size=self.block_size,
            sliding_window=self.window,
        )


def _shape(random: random.Random) -> Shape:
    lens = tuple(random.choice((1, 2, 5, 16, 33, 70)) for _ in range(random.randint(1, 5)))
    return Shape(
        head_dim=random.choice((16, 20, 64, 128)),
        num_kv_heads=random.choice((1, 2, 3)),
        group=random.choice((1, 2, 5)),
        block_size=random.choice((4, 16)),
        window=random.choice((None, None, 7)),
        lens=lens,
        cuts=tuple(random.choice((0, length // 2, length - 1)) for length in lens),
    )


def cpu_reasons(backend: AttentionBackend) -> list[str]:
    """Why it does not serve an ordinary shape on a CPU; empty means that it does."""
    return backend.why_not(Shape(64, 2, 2, 16, None, (1,), (0,)).needs("cpu", torch.float32))


def check_attention_backend(
    backend: AttentionBackend,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_cases: int = 20,
    seed: int = 0,
    tolerance: float | None = None,
) -> None:
    """Fuzz `forward` with shapes that `why_not` takes; at least one must be.

    Each case computes rows of random lengths in two steps over a pool that is NaN where nothing was stored, compares with
    attention over the whole row (relative error `tolerance`, by default 1e-4 or, for 16-bit types, 2e-2), and the first
    row alone with the same row in the batch.
    """
    rng = random.Random(seed)
    tolerance = tolerance or (1e-4 if dtype == torch.float32 else 2e-2)
    shapes = [_shape(rng) for _ in range(num_cases)]
    served = [shape for shape in shapes if not backend.why_not(shape.needs(device, dtype))]
    refused = {reason for shape in shapes for reason in backend.why_not(shape.needs(device, dtype))}
    require(bool(served), f"why_not refuses all of {num_cases} shapes: {', '.join(sorted(refused))}")
    for index, shape in enumerate(served):
        _check_shape(backend, shape, device, dtype, seed + index, tolerance)


def _check_shape(
    backend: AttentionBackend, shape: Shape, device: str, dtype: torch.dtype, seed: int, tolerance: float
) -> None:
    rows = PagedRows(shape.lens, block_size=shape.block_size, seed=seed, device=device)
    generator = torch.Generator().manual_seed(seed)

    def drawn(heads: int) -> list[Tensor]:
        sizes = [(length, heads, shape.head_dim) for length in shape.lens]
        return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]

    q, k, v = drawn(shape.num_kv_heads * shape.group), drawn(shape.num_kv_heads), drawn(shape.num_kv_heads)
    kv = rows.pool(backend.kv_shape(shape.block_size, shape.num_kv_heads, shape.head_dim), dtype)
    step = _Steps(backend, rows, kv, (q, k, v), shape)
    begun = [index for index, cut in enumerate(shape.cuts) if cut]
    if begun:
        step([0] * len(shape.lens), shape.cuts, begun)
    counts = [length - cut for length, cut in zip(shape.lens, shape.cuts, strict=True)]
    together = step(shape.cuts, counts, range(len(shape.lens)))
    for index, out in enumerate(together):
        expected = attention(q[index], k[index], v[index], shape.head_dim**-0.5, shape.window)[shape.cuts[index] :]
        require_close(f"{shape}: row {index}", out, expected, tolerance)
    alone = step(shape.cuts, counts, [0])[0]
    require_close(f"{shape}: row 0 alone and in a batch", alone, together[0], tolerance)


class _Steps:
    """Runs steps of a case; a result for each row that took part."""

    def __init__(
        self, backend: AttentionBackend, rows: PagedRows, kv: Tensor, qkv: tuple[list[Tensor], ...], shape: Shape
    ) -> None:
        self._backend, self._rows, self._kv, self._qkv, self._shape = backend, rows, kv, qkv, shape

    def __call__(self, starts: Any, counts: Any, members: Any) -> list[Tensor]:
        batch = self._rows.batch(starts, counts, members)
        q, k, v = (torch.cat([x[i][starts[i] : starts[i] + counts[i]] for i in members]) for x in self._qkv)
        meta = self._backend.prepare(batch)
        scale = self._shape.head_dim**-0.5
        out = self._backend.forward(q, k, v, self._kv, meta, scale=scale, window=self._shape.window)
        require(out.shape == q.shape and out.is_contiguous(), f"forward gave {tuple(out.shape)}; expected: q's, contiguous")
        require(out.dtype == q.dtype, f"forward gave {out.dtype}; expected: q's dtype {q.dtype}")
        return list(out.split([counts[i] for i in members]))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of one whole row in float32: q [L, H, D], k and v [L, K, D] → [L, H, D] in q's dtype."""
    group, length = q.shape[1] // k.shape[1], q.shape[0]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q.float(), keys) * scale
    position = torch.arange(length, device=q.device)
    seen = position <= position.unsqueeze(1)
    if window is not None:
        seen &= position > position.unsqueeze(1) - window
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values).to(q.dtype)
