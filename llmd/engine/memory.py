"""How large a step may be after one found no memory: half as large, later more again; after each relapse much later.

Computing again costs what a sequence had computed, so failures that come in quick succession could go on for ever. They
cannot: from the fourth on each ends the largest sequence of its step, until so many steps went well that the budget grows.
"""

from __future__ import annotations

_MIN_TOKENS = 16
_MAX_TRIES = 4
_PATIENCE_STEPS = 256
_MAX_PATIENCE_STEPS = 1 << 16


class TokenBudget:
    """The token budget of a step."""

    def __init__(self, full: int) -> None:
        self.tokens = full
        self.num_failures = 0
        self._full = full
        self._num_tries = 0
        self._num_good = 0
        self._patience = _PATIENCE_STEPS // 2  # steps that must go well before the budget grows

    @property
    def is_full(self) -> bool:
        """Whether nothing is to be made up for."""
        return self.tokens == self._full and not self._num_tries

    def failed(self) -> bool:
        """A step found no memory; whether smaller steps have been tried often enough."""
        self.num_failures += 1
        self._num_tries += 1
        self._num_good = 0
        self._patience = min(2 * self._patience, _MAX_PATIENCE_STEPS)
        self.tokens = max(min(_MIN_TOKENS, self._full), self.tokens // 2)
        return self._num_tries >= _MAX_TRIES

    def succeeded(self) -> bool:
        """A step was computed; whether the budget has grown."""
        self._num_good += 1
        if self._num_good < self._patience:
            return False
        self._num_good = self._num_tries = 0
        if self.tokens == self._full:
            self._patience = _PATIENCE_STEPS // 2
        self.tokens = min(self._full, 2 * self.tokens)
        return True
