"""The works: what each engine is asked to do, the same prompts for all, and the figure that comes of the seconds it took."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Order(NamedTuple):
    """One call of an engine's generate."""

    prompts: list[list[int]]
    num_tokens: int


class Work(NamedTuple):
    """What is asked, and how its seconds become a figure."""

    name: str
    summary: str
    num_seqs: int
    input_len: tuple[int, int]
    output_lens: tuple[int, ...]  # of each timed call
    figure: Callable[[Sequence[Order], Sequence[float]], float]

    @property
    def max_len(self) -> int:
        """Most tokens of a sequence."""
        return self.input_len[1] + max(self.output_lens)

    def orders(self, seed: str, vocab_size: int) -> list[Order]:
        """The timed calls: prompts are new for each seed and each call, so that no prefix cache helps."""
        rng = random.Random(f"{self.name} {seed}")
        return [Order(self._prompts(rng, vocab_size, self.input_len), num_tokens) for num_tokens in self.output_lens]

    def warm_up(self, seed: str, vocab_size: int) -> Order:
        """A short call before the timed ones, as wide as they are."""
        rng = random.Random(f"{self.name} {seed} warm-up")
        return Order(self._prompts(rng, vocab_size, (8, 8)), 2)

    def _prompts(self, rng: random.Random, vocab_size: int, input_len: tuple[int, int]) -> list[list[int]]:
        return [[rng.randrange(vocab_size) for _ in range(rng.randint(*input_len))] for _ in range(self.num_seqs)]


def after_first(orders: Sequence[Order], seconds: Sequence[float]) -> float:
    """Tokens a second of the last call behind its first one, whose time the better of the calls before it tells."""
    return (orders[-1].num_tokens - 1) / max(seconds[-1] - min(seconds[:-1]), 1e-9)


def output_rate(orders: Sequence[Order], seconds: Sequence[float]) -> float:
    """Output tokens a second from the call to its end."""
    return sum(len(order.prompts) * order.num_tokens for order in orders) / sum(seconds)


def prefill_rate(orders: Sequence[Order], seconds: Sequence[float]) -> float:
    """Prompt tokens a second until the first token, of the better call."""
    return max(len(order.prompts[0]) / s for order, s in zip(orders, seconds, strict=True))


SERVED = {
    work.name: work
    for work in (
        Work("decode", "batch 1, 128 in, 128 out: tokens/s after the first", 1, (128, 128), (1, 1, 128), after_first),
        Work("prefill", "one prompt of 1,024: prompt tokens/s to the first token", 1, (1024, 1024), (1, 1), prefill_rate),
        Work("many16", "16 at once, 64-192 in, 64 out: output tokens/s", 16, (64, 192), (64,), output_rate),
        Work("many64", "64 at once, 64-192 in, 64 out: output tokens/s", 64, (64, 192), (64,), output_rate),
        Work("http", "16 SSE streams, 64-192 in, 64 out, beside in-process", 16, (64, 192), (64,), output_rate),
    )
}
START = "start"
MEMORY = "memory"
HTTP = "http"
NAMES = (START, *SERVED)
UNITS = {START: "s", MEMORY: "bytes"} | dict.fromkeys(SERVED, "tokens/s")
MORE_OF = {"many16": "many64"}  # who is far behind at the one need not show it at the other
LESS_IS_BETTER = {START, MEMORY}
FIRST_TOKEN = Order([list(range(16))], 1)


def describe(names: Sequence[str]) -> dict[str, Any]:
    """The works, for the result."""
    told = {START: "process start to first token, warm page cache", MEMORY: "peak resident memory over the other works"}
    return {name: told.get(name) or SERVED[name].summary for name in (*names, MEMORY)}
