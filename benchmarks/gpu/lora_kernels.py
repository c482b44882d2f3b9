"""What adapters add to a linear of a model: a slot each, one for all, and none though there are slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.setting import Setting, Work
from llmd_kernels.lora import LoraWeights, add_lora, reference, rows_of_slots

_RANK = 16


def _make(num_rows: int, num_slots: int, slot_of: Callable[[int], int]) -> Callable[[Setting, dict[str, Any]], Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        device, depth, width = setting.device, config["hidden_size"], 2 * config["intermediate_size"]
        rows = min(num_rows, 9) if setting.is_tiny else num_rows
        weights = LoraWeights(
            torch.randn(num_slots, 2, _RANK, depth, device=device).bfloat16(),
            torch.randn(num_slots, _RANK, width, device=device).bfloat16(),
            torch.full((num_slots, 2), _RANK, dtype=torch.int32, device=device),
            (0, width // 2, width),
        )
        x, y = (torch.randn(rows, size, device=device).bfloat16() for size in (depth, width))
        used = rows_of_slots(torch.tensor([slot_of(row) % num_slots for row in range(rows)]), num_slots, device)
        num_used = len(used.spans)
        return Work(
            lambda: add_lora(y, x, weights, used),
            lambda: reference.add_lora(y, x, weights, used),
            2 * num_used * _RANK * (2 * depth + width) + 2 * rows * (depth + 2 * width),
        )

    return make


MAKE = {
    "lora, 64 rows, 8 adapters": _make(64, 8, lambda row: row),
    "lora, 64 rows, 1 adapter": _make(64, 8, lambda row: 0),
    "lora, 2048 tokens, 4 adapters": _make(2048, 8, lambda row: row // 512),
}
