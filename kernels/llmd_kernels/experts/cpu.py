"""Tables of the experts' weights, and the launches of cpu.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from llmd_kernels.experts.weights import ExpertWeights, Fp8Weight, Weight
from llmd_kernels.fp8_linear import grid_of
from llmd_kernels.grouped_linear import GroupedWeight
from llmd_kernels.grouped_linear.cpu import block_size, num_blocks
from llmd_kernels.int8_linear import Int8Weight
from llmd_kernels.linear.ways import max_rows
from llmd_kernels.native import DTYPES, library

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # as enum Kind in gates.h
_DENSE, _INT8, _GROUPED, _FP8 = range(4)  # as enum Format in experts.h
_LINE = 64  # bytes
_SPARE = 16  # rows that tiles may reach beyond the last expert's, and what rounding up adds
_OWN_BYTES = 64 << 10  # as Rooms::OWN in cpu.cpp
_MOST_BYTES = 256 << 20  # of scratch: more tokens than fit are taken some at a time
_PLAN_BYTES = 128  # more than what a plan has but for experts and pairs

_Column = Sequence[torch.Tensor | None]


class _Facts(NamedTuple):
    """The head of a table, as struct Table in experts.h."""

    format: int
    num_experts: int
    width: int
    depth: int
    bits: int = 0
    group_size: int = 1
    block: int = 1
    zero: int = 0


class _Table(NamedTuple):
    array: ctypes.Array[ctypes.c_int64]  # the facts, then columns of one word an expert
    row_bytes: int  # of one of x's rows as the product reads it
    kept: list[torch.Tensor]


def why_not(x: torch.Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> str | None:
    """What keeps the compiled kernels from these experts; None: nothing."""
    if down.kind is not gate_up.kind:
        return f"no kernel for {gate_up.kind.__name__} together with {down.kind.__name__}"
    if gate_up.kind is torch.Tensor and x.shape[0] > max_rows() * gate_up.num_experts:
        return "torch's product is faster for so many rows"
    return _why_not(x, gate_up.each[0]) or _why_not(x, down.each[0])


def _why_not(x: torch.Tensor, weight: Weight) -> str | None:
    if isinstance(weight, Int8Weight):
        return None if weight.is_in_panels else "no kernel for rows of int8"
    if isinstance(weight, GroupedWeight):
        return None if weight.layout == "panels" else f"no kernel for groups in {weight.layout}"
    if isinstance(weight, Fp8Weight):
        return None if weight.activations == "float" else "no kernel for fp8 inputs"
    return None if weight.dtype == x.dtype else f"no kernel for {x.dtype} by {weight.dtype}"


def experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: ExpertWeights, down: ExpertWeights, activation: str
) -> torch.Tensor:
    """As in the package, for weights that `why_not` has nothing against."""
    if x.stride(1) != 1:
        x = x.contiguous()
    ids, weights = ids.contiguous(), weights.contiguous()
    tables = _table(gate_up), _table(down)
    out = torch.empty(x.shape[0], down.out_features, dtype=x.dtype)
    read = max(table.row_bytes for table in tables)
    given = max(gate_up.out_features, down.out_features) * x.element_size()
    at_once = max(1, _MOST_BYTES // (ids.shape[1] * (read + given)))
    for start in range(0, x.shape[0], at_once):
        part = slice(start, start + at_once)
        _launch(out[part], x[part], ids[part], weights[part], tables, read, given, _ACTIVATIONS[activation])
    return out


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tables: tuple[_Table, _Table],
    read: int,
    given: int,
    activation: int,
) -> None:
    gate_up, down = (table.array for table in tables)
    pairs, line = ids.numel(), x.element_size() * gate_up[2]
    plan_bytes = _PLAN_BYTES + 32 * gate_up[1] + 12 * pairs
    last = min(pairs * given, 4 * _OWN_BYTES)  # where rows are few: a number takes four times a byte at most
    num_bytes = plan_bytes + (pairs + _SPARE) * read + line + pairs * given + last + 5 * _LINE
    scratch = torch.empty(num_bytes, dtype=torch.uint8)
    lib = library()
    assert lib is not None
    lib.llmd_experts(
        out.data_ptr(), x.data_ptr(), ids.data_ptr(), weights.data_ptr(), gate_up, down, scratch.data_ptr(), x.shape[0],
        ids.shape[1], x.stride(0), activation, DTYPES[x.dtype],
    )  # fmt: skip


def _table(weights: ExpertWeights) -> _Table:
    """Made once, and kept where its weights are; anew where those were moved meanwhile."""
    table: _Table | None = getattr(weights, "cpu_table", None)
    if table is None or table.kept[0].data_ptr() != table.array[len(_Facts._fields)]:
        table = _make(weights)
        weights.cpu_table = table  # type: ignore[attr-defined]
    return table


def _make(weights: ExpertWeights) -> _Table:
    first, size = weights.each[0], (weights.num_experts, weights.out_features, weights.in_features)
    depth = weights.in_features
    if isinstance(first, Int8Weight):
        each: list[Int8Weight] = list(weights.each)  # type: ignore[arg-type]
        columns = [[w.packed for w in each], [w.scale for w in each]]
        return _filled(_Facts(_INT8, *size), columns, depth + 2 * _LINE + 8)
    if isinstance(first, GroupedWeight):
        return _of_groups(first, list(weights.each), size)  # type: ignore[arg-type]
    if isinstance(first, Fp8Weight):
        return _of_floats(list(weights.each), size)  # type: ignore[arg-type]
    assert isinstance(first, torch.Tensor)
    dense: list[torch.Tensor] = [w.contiguous() for w in weights.each]  # type: ignore[union-attr]
    return _filled(_Facts(_DENSE, *size), [dense], depth * first.element_size())


def _of_groups(first: GroupedWeight, each: list[GroupedWeight], size: tuple[int, int, int]) -> _Table:
    block, depth = block_size(first.group_size), first.in_features
    facts = _Facts(_GROUPED, *size, first.bits, first.group_size, block, 0 if first.offset is not None else first.zero)
    blocks, groups = num_blocks(depth, first.group_size), -(-depth // first.group_size)
    columns: list[_Column] = [
        [w.packed for w in each], [w.scale for w in each], [w.offset for w in each], [w.columns for w in each]
    ]  # fmt: skip
    row_bytes = blocks * (block + 8) + 4 * groups + 2 * _LINE
    return _filled(facts, columns, row_bytes, [w.factor for w in each])


def _of_floats(each: list[Fp8Weight], size: tuple[int, int, int]) -> _Table:
    grids = [grid_of(w.weight, w.scale, w.block) for w in each]
    _, height, columns = grids[0]
    facts = _Facts(_FP8, *size, group_size=columns, block=height)
    return _filled(facts, [[w.weight for w in each], [grid for grid, *_ in grids]], 4 * size[2])


def _filled(facts: _Facts, columns: Sequence[_Column], row_bytes: int, factors: Sequence[float] = ()) -> _Table:
    words = [tensor.data_ptr() if tensor is not None else 0 for column in columns for tensor in column]
    bits = (ctypes.c_int64 * len(factors)).from_buffer((ctypes.c_double * len(factors))(*factors)) if factors else ()
    words += bits
    kept = [tensor for column in columns for tensor in column if tensor is not None]
    return _Table((ctypes.c_int64 * (len(facts) + len(words)))(*facts, *words), row_bytes, kept)


def route(logits: torch.Tensor, num_chosen: int, *, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] of a dtype the kernels know, E at most 4096 → ids [T, k] int64, weights [T, k] float32."""
    count, num_experts = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    ids = torch.empty(count, num_chosen, dtype=torch.int64)
    weights = torch.empty(count, num_chosen, dtype=torch.float32)
    lib = library()
    assert lib is not None
    lib.llmd_route(
        ids.data_ptr(), weights.data_ptr(), logits.data_ptr(), count, num_experts, logits.stride(0), num_chosen, normalized,
        DTYPES[logits.dtype],
    )  # fmt: skip
    return ids, weights


def add_gated(y: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """y + sigmoid(gate) · x: y and x [T, H], gate [T, 1], of one dtype that the kernels know → [T, H]."""
    y, x, gate = y.contiguous(), x.contiguous(), gate.contiguous()
    out = torch.empty_like(y)
    lib = library()
    assert lib is not None
    lib.llmd_add_gated(
        out.data_ptr(), y.data_ptr(), x.data_ptr(), gate.data_ptr(), y.shape[0], y.shape[1], DTYPES[y.dtype]
    )  # fmt: skip
    return out
