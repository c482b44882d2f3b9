"""Where an installed library attends quicker than the Triton kernels: measured side by side on a device, never reckoned.

Empty until `benchmarks/gpu/tune_libraries.py` has written what it found. What is not in the table is not known, so that the
Triton kernels go first.
"""

from __future__ import annotations

from typing import NamedTuple

_MARGIN = 1.03  # less is noise


class Speed(NamedTuple):
    """The time of the Triton kernels over the library's: above 1 the library is the quicker."""

    decode: float  # 0 where the library's decode is never taken
    prefill: float


class Phases(NamedTuple):
    """Which steps a library computes; the Triton kernels have the others."""

    decode: bool
    prefill: bool


# library, device (sm_90 …), head dim padded to a power of two
_TABLE: dict[tuple[str, str, int], Speed] = {
    # nothing was measured yet
}


def speed(library: str, device: str, head_dim: int) -> Speed | None:
    """What was measured; None where nothing was."""
    return _TABLE.get((library, device, padded(head_dim)))


def phases(found: Speed | None) -> Phases:
    """What a library that was chosen computes: prefill where it is nowhere the quicker, or nothing is known."""
    if found is None or not is_quicker(found):
        return Phases(decode=False, prefill=True)
    return Phases(found.decode >= _MARGIN, found.prefill >= _MARGIN)


def is_quicker(found: Speed | None) -> bool:
    """Whether a library is worth being taken before the Triton kernels."""
    return found is not None and max(found) >= _MARGIN


def padded(head_dim: int) -> int:
    """The next power of two."""
    return 1 << (head_dim - 1).bit_length()
