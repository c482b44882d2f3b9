"""What is made of the results: vLLM's definitions, in one place, with nothing but arithmetic.

    TTFT  first token's arrival - send            TPOT  (E2E - TTFT) / (output tokens - 1), requests of one token aside
    E2E   last token's arrival - send             ITL   each gap between arrivals of tokens after the first
    goodput  requests a second that met every objective given; a request of one token meets any TPOT

Tokens are what the server counted (`usage`). Only requests that ended well enter; failed ones are counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}


@dataclass(slots=True, kw_only=True)
class RequestResult:
    """One request as the client saw it. Times are seconds on one monotonic clock."""

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    sent_s: float = 0.0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    itls_s: list[float] = field(default_factory=list)
    text: str = ""
    error: str = ""  # empty: it ended well
    is_counted_by_server: bool = True  # False: no usage came, chunks were counted instead

    @property
    def is_ok(self) -> bool:
        """Whether it ended well."""
        return not self.error

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None where there was only one."""
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else None


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """`ttft:500` … into milliseconds by metric; raises ValueError that names the pair."""
    objectives = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        if name not in ("ttft", "tpot", "e2el"):
            raise ValueError(f"goodput must be given as ttft:MS, tpot:MS or e2el:MS, got {pair!r}")
        try:
            objectives[name] = float(value)
        except ValueError:
            raise ValueError(f"goodput {name} must be a number of milliseconds, got {value!r}") from None
        if not 0 <= objectives[name] < float("inf"):
            raise ValueError(f"goodput {name} must be a number of milliseconds, not negative, got {value!r}")
    return objectives


def meets(result: RequestResult, objectives: Mapping[str, float]) -> bool:
    """Whether a request that ended well met every objective (milliseconds)."""
    seen = {"ttft": result.ttft_s, "tpot": result.tpot_s or 0.0, "e2el": result.e2e_s}
    return all(seen[name] * 1000 <= limit for name, limit in objectives.items())


def distribution(values_s: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles (linear interpolation) in milliseconds; zeros of nothing."""
    values = np.asarray(values_s or [0.0]) * 1000
    found = {"mean": float(values.mean()), "median": float(np.median(values)), "std": float(values.std())}
    return found | {f"p{percentile:g}": float(np.percentile(values, percentile)) for percentile in percentiles}


def max_concurrent(results: Iterable[RequestResult]) -> int:
    """The most requests that were under way together."""
    edges = sorted((edge for r in results for edge in ((r.sent_s, 1), (r.sent_s + r.e2e_s, -1))), key=lambda e: (e[0], e[1]))
    running = most = 0
    for _, change in edges:
        running += change
        most = max(most, running)
    return most


def samples(results: Iterable[RequestResult]) -> dict[str, list[float]]:
    """The values behind each metric, in seconds."""
    ok = [result for result in results if result.is_ok]
    return {
        "ttft": [result.ttft_s for result in ok],
        "tpot": [tpot for result in ok if (tpot := result.tpot_s) is not None],
        "itl": [gap for result in ok for gap in result.itls_s],
        "e2el": [result.e2e_s for result in ok],
    }


def summarize(
    results: Sequence[RequestResult],
    duration_s: float,
    *,
    metrics: Sequence[str] = ("ttft", "tpot", "itl"),
    percentiles: Sequence[float] = (99,),
    objectives: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The whole of a run under vLLM's result keys (times in milliseconds, rates per second)."""
    ok = [result for result in results if result.is_ok]
    num_input, num_output = sum(r.num_prompt_tokens for r in ok), sum(r.num_output_tokens for r in ok)
    summary: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(ok),
        "failed": len(results) - len(ok),
        "failures": dict(Counter(result.error for result in results if not result.is_ok).most_common()),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(ok) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_concurrent_requests": max_concurrent(ok),
        "tokens_counted_by_server": all(result.is_counted_by_server for result in ok),
    }
    if objectives:
        summary["request_goodput"] = sum(meets(result, objectives) for result in ok) / duration_s
    values = samples(ok)
    for metric in metrics:
        for name, value in distribution(values[metric], percentiles).items():
            summary[f"{name}_{metric}_ms"] = value
    return summary
