"""The layout of panels.h: sixteen rows of W side by side, four features of each together."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmd_kernels import native

PANEL = 16  # rows of W
QUAD = 4  # features
STEP = 16  # features, of which a row has a whole number


def quads(q: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K], K a multiple of 4 → [panels, K / 4, 16, 4], zeros for the rows that the last panel lacks."""
    if q.is_cpu and (lib := native.library()) is not None:
        q = q.contiguous()
        packed = torch.empty(-(-q.shape[0] // PANEL), q.shape[1] // QUAD, PANEL, QUAD, dtype=torch.uint8)
        lib.llmd_pack_quads(packed.data_ptr(), q.data_ptr(), q.shape[0], q.shape[1] // QUAD)
        return packed
    words = F.pad(q, (0, 0, 0, -q.shape[0] % PANEL)).contiguous().view(torch.int32)  # four features move as one
    return words.view(-1, PANEL, words.shape[1]).transpose(1, 2).contiguous().view(torch.uint8).unflatten(2, (PANEL, QUAD))


def rows(q: torch.Tensor) -> torch.Tensor:
    """Back to [16 · panels, K]."""
    words = q.contiguous().view(q.shape[0], q.shape[1], -1).view(torch.int32)
    return words.transpose(1, 2).contiguous().view(torch.uint8).view(q.shape[0] * PANEL, -1)
