"""Measures installed attention libraries beside the Triton kernels on this device, and writes how fast they are.

    python3 benchmarks/gpu/tune_libraries.py [--only LIBRARY …] [--dry-run]

For each library and head dim: the least of its ratios over several shapes, the two called in turns on the same cache. Where
`attention_backend` is "auto", a library that is quicker is then taken before the Triton kernels, for the steps in which it
is. `--dry-run` shows the table instead of writing it; without a GPU nothing can be measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.extend(str(Path(__file__).resolve().parents[2] / name) for name in ("", "plugins", "kernels"))
from benchmarks.gpu import tables
from benchmarks.gpu.setting import Setting, median_ms
from llmd.api.v1 import AttentionNeeds, LibraryAttention, LibraryStep
from llmd_kernels.gpu import device_name
from llmd_kernels.paged_attention import AttentionCall, libraries, paged_attention
from llmd_kernels.paged_attention.libraries import Speed
from llmd_plugins.attention.flash_attn import FlashAttention2, FlashAttention3
from llmd_plugins.attention.flashinfer import FlashInfer
from llmd_plugins.attention.torch_varlen import TorchVarlen

PATH = Path(libraries.__file__)
LIBRARIES = {library.name: library for library in (FlashAttention2, FlashAttention3, FlashInfer, TorchVarlen)}
HEAD_DIMS = (64, 128, 256)
_HEADS, _KV_HEADS = 32, 8
_LAYERS = 16  # which share what a library works out once in a step
_ROUNDS = 3
_TINY_DIVISOR = 64


class Shape(NamedTuple):
    """Rows of one length, so many tokens of each in this step."""

    num_rows: int
    length: int
    count: int


DECODE = (Shape(1, 16384, 1), Shape(8, 4096, 1), Shape(64, 2048, 1), Shape(256, 1024, 1))
PREFILL = (Shape(1, 8192, 8192), Shape(1, 32768, 2048), Shape(8, 1024, 1024), Shape(16, 4096, 128))


def needs_of(library: Any, head_dim: int, device: str) -> AttentionNeeds:
    """Of a model whose blocks are as the library wants them."""
    block_size = max(16, library.limits.block_multiple)
    return AttentionNeeds(
        device=device, dtype="bfloat16", head_dim=head_dim, num_heads=_HEADS, num_kv_heads=_KV_HEADS, block_size=block_size
    )


def make_call(shape: Shape, head_dim: int, block_size: int, device: torch.device) -> AttentionCall:
    """Blocks lie scattered, and a layer's between those of another."""
    held = -(-shape.length // block_size)
    pool = torch.randn(shape.num_rows * held, 2, 2, block_size, _KV_HEADS, head_dim, device=device).bfloat16()
    table = torch.randperm(shape.num_rows * held, device=device).to(torch.int32).view(shape.num_rows, held)
    q = torch.randn(shape.num_rows * shape.count, _HEADS, head_dim, device=device).bfloat16()
    starts = torch.arange(shape.num_rows + 1, dtype=torch.int32, device=device) * shape.count
    lengths = torch.full((shape.num_rows,), shape.length, dtype=torch.int32, device=device)
    rows = torch.arange(shape.num_rows, device=device)
    return AttentionCall(q, pool[:, 1], table, rows, starts, lengths, shape.count, head_dim**-0.5)


def ratio(library: Any, call: AttentionCall, max_seq_len: int, setting: Setting) -> float:
    """Time of the Triton kernels over the library's, for the layers of a step: the least of several rounds."""

    counts = call.query_start.diff().long().cpu().numpy()
    host_lens = np.stack((call.seq_lens.long().cpu().numpy() - counts, counts))

    def ours() -> None:
        for _ in range(_LAYERS):
            paged_attention(call)

    def theirs() -> None:
        step = LibraryStep(SimpleNamespace(max_seq_len=max_seq_len, host_lens=host_lens))  # type: ignore[arg-type]
        for _ in range(_LAYERS):
            library.attend(call, step)

    return min(median_ms(setting, ours, 5) / median_ms(setting, theirs, 5) for _ in range(_ROUNDS))


def speed_of(library: Any, head_dim: int, setting: Setting) -> Speed:
    """The least ratio over the shapes of each kind of step; 0 for decodes that graphs cannot hold."""
    block_size = needs_of(library, head_dim, setting.device.type).block_size

    def least(shapes: tuple[Shape, ...]) -> float:
        if setting.is_tiny:
            shapes = tuple(Shape(min(rows, 3), -(-length // _TINY_DIVISOR), min(count, 8)) for rows, length, count in shapes)
        calls = ((shape, make_call(shape, head_dim, block_size, setting.device)) for shape in shapes)
        return round(min(ratio(library, call, shape.length, setting) for shape, call in calls), 2)

    return Speed(least(DECODE) if library.can_decode else 0.0, least(PREFILL))


def measured(
    names: list[str], setting: Setting, tell: Callable[[str], None]
) -> Iterator[tuple[tuple[str, str, int], Speed]]:
    """Each usable library's speeds; why the others are not usable is told."""
    device = device_name(setting.device)
    for name in names:
        library = LIBRARIES[name]()
        for head_dim in HEAD_DIMS:
            reasons = LibraryAttention(library).why_not(needs_of(library, head_dim, "cuda"))
            if reasons:
                tell(f"{name}, head dim {head_dim}: not measured: {', '.join(reasons)}")
                continue
            found = speed_of(library, head_dim, setting)
            tell(f"{name}, head dim {head_dim} on {device}: decode {found.decode:.2f}, prefill {found.prefill:.2f}")
            yield (name, device, head_dim), found


def lines(entries: dict[tuple[str, str, int], Speed]) -> list[str]:
    """The table as it stands in its file."""
    shown = {key: entries[key] for key in sorted(entries)}
    return [f'    ("{name}", "{device}", {dim}): {tables.called(found)},' for (name, device, dim), found in shown.items()]


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen libraries; what was measured of others, or elsewhere, stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(LIBRARIES), default=sorted(LIBRARIES), metavar="LIBRARY")
    parser.add_argument("--dry-run", action="store_true", help="show, write nothing")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("speeds are measured, and there is no GPU")
    setting = Setting(torch.device("cuda", torch.cuda.current_device()), False, "", Path(), {})
    found = dict(measured(given.only, setting, print))
    new = lines({**libraries._TABLE, **found})
    print("\n".join(new))
    if found and not given.dry_run:
        tables.write(PATH, "_TABLE", new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
