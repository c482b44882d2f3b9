"""Into how many parts a row of logits is cut; the figures are reckoned, a tuning run may replace them."""

from __future__ import annotations

BLOCK = 1024  # tokens at once
COUNTED = 256  # tokens at once where each is compared with sixteen thresholds
MAX_SPLITS = 32
_PROGRAMS_A_PROCESSOR = 4


def num_splits(num_rows: int, vocab_size: int, num_processors: int) -> int:
    """Parts of each row, a power of two; hangs on nothing that changes from step to step of a captured graph."""
    wanted = max(1, num_processors * _PROGRAMS_A_PROCESSOR // max(1, num_rows))
    most = max(1, min(MAX_SPLITS, vocab_size // (2 * BLOCK)))
    return 1 << (min(wanted, most).bit_length() - 1)
