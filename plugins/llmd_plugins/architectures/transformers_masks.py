"""Who sees whom, asked of a model once: in its first pass each mask that it would make is described instead of made.

A layer's own word is not enough: some have a window in their mask and do not tell attention, some tell of one that their
mask has not. What Transformers computes is what the mask says, and a paged cache serves causal masks and windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmd.api.v1 import ModelError

_FAR = 1 << 24  # beyond any context
_MARK = "llmd_sight"


class Sight(NamedTuple):
    """What a query sees: itself and the window - 1 tokens before it; None: all before it."""

    window: int | None


def describe(*, mask_function: Callable[..., Any], device: Any = None, **_: Any) -> Tensor:
    """What Transformers calls to make a mask: a small tensor that carries what the mask would be."""
    mask = torch.zeros(1, 1, 1, 1, device=device)
    setattr(mask, _MARK, _sight(mask_function))
    return mask


def sight_of(mask: Tensor | None, where: str) -> Sight | None:
    """What `describe` found; None where the model makes no mask. Raises ModelError for a mask of another kind."""
    if mask is None:
        return None
    sight: Sight | None = getattr(mask, _MARK, None)
    if sight is None:
        raise ModelError(f"{where}: its model makes a mask that is neither causal nor a window, or one of its own")
    return sight


def _sight(sees: Callable[..., Any]) -> Sight | None:
    """The window of a mask, found by asking it; None for a mask of another kind."""
    windows = {_window(sees, query) for query in (_FAR, _FAR - 12345)}
    return Sight(windows.pop() or None) if len(windows) == 1 and -1 not in windows else None


def _window(sees: Callable[..., Any], query: int) -> int:
    """How many tokens up to and with itself a query sees; 0: all, -1: not just these, or tokens behind it."""

    def at(key: int) -> bool:
        zero, q, k = torch.tensor(0), torch.tensor(query), torch.tensor(key)
        return bool(sees(zero, zero, q, k))

    if not at(query) or at(query + 1) or at(query + _FAR):
        return -1
    if at(0):
        return 0 if all(at(query - (1 << power)) for power in range(24)) else -1
    near, far = 0, query  # distances: seen, not seen
    while far - near > 1:
        middle = (near + far) // 2
        near, far = (middle, far) if at(query - middle) else (near, middle)
    return far
