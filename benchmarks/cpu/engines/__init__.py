"""Adapters: how each engine is loaded and given work. They run in a process of their own, in that engine's environment.

An adapter is a module with a class `Engine`:

    Engine(model: str, options: dict)            loads
    facts() -> dict                              versions and settings worth keeping
    prepare(num_seqs: int, max_len: int)         the next work's sequences at once and tokens each; not timed
    generate(prompts, num_tokens) -> Generated   greedy, EOS ignored, all prompts given together
    close()

`options` are those of every engine (format, threads, max_model_len, max_num_seqs, kv_bytes) and its own as `settings`.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Sequence
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1


class Generated(NamedTuple):
    """What came of each prompt."""

    counts: list[int]  # output tokens
    first: list[int]  # the first token of each; empty where the engine does not tell

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Generated:
        """Of output token ids."""
        return cls([len(row) for row in rows], [int(row[0]) for row in rows])


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends: a stopped process could not notice."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
