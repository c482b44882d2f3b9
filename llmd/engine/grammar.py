"""Constraints on output, seen from the engine: matchers that accept token ids and fill bitmasks.

A compiled grammar is immutable and shared; each sequence follows it with a matcher of its own. Matchers are touched by the
loop thread (accept) and by one pool thread at a time (fill), never at once: a mask is filled after the commit of the step
before and awaited by the executor before it samples, and only then can the next token be accepted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:  # numpy is imported with the first mask: plugins that register grammars are loaded by every command
    import numpy as np
    import numpy.typing as npt

    Bitmask: TypeAlias = npt.NDArray[np.int32]  # [rows, ceil(vocab_size / 32)], bit set = token allowed

log = logging.getLogger(__name__)


class GrammarMatcher(Protocol):
    """Follows one sequence through a grammar."""

    def accept(self, token_ids: Seq[int]) -> bool:
        """Advance over tokens; False, and nothing advanced past it, at a token that the grammar forbids."""

    def fill(self, mask_row: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next, an end-of-sequence token among them where the grammar may end."""

    def forced(self) -> list[int]:
        """Tokens that must come next, as far as there is no choice; may always be empty."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""


class CompiledGrammar(Protocol):
    """A constraint ready for use, shared between requests."""

    def matcher(self) -> GrammarMatcher:
        """Start at the beginning."""


class GuardedGrammar:
    """A compiled grammar whose matchers do not raise into the step loop: what fails ends its own sequence.

    Libraries of native code end in panics that are no Exception; one of them must not take all sequences with it.
    """

    def __init__(self, compiled: CompiledGrammar) -> None:
        self.compiled = compiled

    def matcher(self) -> GrammarMatcher:
        """Start at the beginning."""
        return _GuardedMatcher(self.compiled.matcher())


class _GuardedMatcher:
    """`accept` says False where the library fails, which ends the sequence; `fill` tells it by the error of its row."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: GrammarMatcher) -> None:
        self._matcher = matcher

    def accept(self, token_ids: Seq[int]) -> bool:
        """Advance over tokens."""
        try:
            return self._matcher.accept(token_ids)
        except BaseException as error:  # noqa: BLE001 - a panic of native code is no Exception
            _tell(error, "accept")
            return False

    def fill(self, mask_row: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next; raises RuntimeError for any failure."""
        try:
            self._matcher.fill(mask_row)
        except BaseException as error:
            _tell(error, "fill")
            raise RuntimeError(str(error)) from error

    def forced(self) -> list[int]:
        """Tokens that must come next; none where the library fails."""
        try:
            return self._matcher.forced()
        except BaseException as error:  # noqa: BLE001 - as above
            _tell(error, "forced")
            return []

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        try:
            return self._matcher.finished
        except BaseException as error:  # noqa: BLE001 - as above
            _tell(error, "finished")
            return False


def _tell(error: BaseException, where: str) -> None:
    """Log a failure of a grammar's library; what ends the process is raised again."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    log.warning("a grammar failed in %s: %s: %s", where, type(error).__name__, str(error)[:300])


def bitmask_words(vocab_size: int) -> int:
    """32-bit words of a mask row."""
    return -(-vocab_size // 32)


class MaskJob:
    """The masks of one step: filled on a pool thread, awaited by the executor, errors read at the step's commit."""

    def __init__(self, vocab_size: int) -> None:
        self.bitmask: Future[Bitmask] = Future()
        self.errors: dict[int, str] = {}  # by index of the mask; that row is left unconstrained and its sequence ends
        self.is_started = False
        self._vocab_size = vocab_size

    def fill(self, matchers: Seq[GrammarMatcher | None]) -> None:
        """Fill a row for each matcher and hand all over. None (a row whose result is dropped) allows everything."""
        import numpy as np

        bitmask = np.full((len(matchers), bitmask_words(self._vocab_size)), -1, dtype=np.int32)
        for index, matcher in enumerate(matchers):
            if matcher is None:
                continue
            try:
                matcher.fill(bitmask[index])
            except Exception as error:  # noqa: BLE001 - a grammar that raises must not hurt the other rows of its step
                bitmask[index] = -1
                self.errors[index] = f"the grammar failed: {type(error).__name__}"
        self._hand_over(bitmask)

    def skip(self, num_rows: int) -> None:
        """Allow everything, where it is not filled yet: nobody will read what the step samples."""
        import numpy as np

        self.is_started = True
        self._hand_over(np.full((num_rows, bitmask_words(self._vocab_size)), -1, dtype=np.int32))

    def _hand_over(self, bitmask: Bitmask) -> None:
        with suppress(InvalidStateError):  # whoever comes second has nothing to add
            self.bitmask.set_result(bitmask)
