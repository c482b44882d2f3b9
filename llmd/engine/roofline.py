"""The roofline of decoding: a step cannot be faster than its bytes, the weights once and the KV of each row, are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmd.engine.executor import ExecutorInfo

CONTEXT = 1024  # tokens, where a rate is told for one sequence
# Share of the bandwidth that decoding one sequence reaches, by the bits of a weight: fewer bits leave more arithmetic to a
# byte, and the work between the products takes a larger part. Measured with a model of 0.5B parameters on two cores.
_SHARES = ((12, 0.9), (6, 0.85), (0, 0.7))


def kv_token_bytes(info: ExecutorInfo) -> float:
    """Bytes of KV that a row reads for each position it attends to."""
    num_slots = info.num_blocks * info.block_size
    return info.kv_bytes / num_slots * max(info.num_block_tables, 1) if num_slots else 0.0


def read_bytes(info: ExecutorInfo, num_steps: int, num_context_tokens: int) -> float:
    """What steps have to read: the weights once each, and the KV of every position that their rows attend to."""
    weights = info.facts.get("step_bytes", info.weights_bytes)
    return float(num_steps * weights + num_context_tokens * kv_token_bytes(info))


def utilization(info: ExecutorInfo, num_steps: int, num_context_tokens: int, seconds: float) -> float | None:
    """Share of the memory bandwidth (MBU) that steps achieved; None where it was not measured, or nothing ran."""
    bandwidth = info.facts.get("memory_bandwidth")
    if not bandwidth or seconds <= 0:
        return None
    return float(read_bytes(info, num_steps, num_context_tokens) / seconds / bandwidth)


def max_decode_rate(bandwidth: float, step_bytes: float, kv_token_bytes: float, context: int = CONTEXT) -> float:
    """Tokens a second of one sequence, if reading were all there is to do."""
    return bandwidth / max(step_bytes + context * kv_token_bytes, 1)


def likely_share(weight_bits: float) -> float:
    """The share of that which is likely reached on a CPU: an estimate, see above."""
    return next(share for bits, share in _SHARES if weight_bits > bits or not bits)
