"""Which figures are published, under which names, with which buckets; vLLM's names where the meaning is the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Reading(NamedTuple):
    """One figure of EngineStats and how it is published: as `llmd_<name>`, and under names of vLLM's."""

    name: str
    field: str
    help: str
    is_counter: bool = False
    has_twin: bool = False  # vllm:<name>
    aliases: tuple[str, ...] = ()  # further names of vLLM's


READINGS = (
    Reading("num_requests_running", "num_running", "Sequences that hold a row.", has_twin=True),
    Reading("num_requests_waiting", "num_waiting", "Sequences that wait for a row.", has_twin=True),
    Reading("num_waiting_tokens", "num_waiting_tokens", "Prompt tokens of the sequences that wait."),
    Reading("kv_cache_usage_perc", "kv_usage", "Share of KV blocks in use, 0 to 1.", False, True, ("gpu_cache_usage_perc",)),
    Reading("kv_blocks", "num_blocks", "KV blocks of the pool."),
    Reading("kv_blocks_free", "num_free_blocks", "KV blocks that no sequence holds."),
    Reading(
        "prefix_cache_queries", "prefix_queries", "Prompt tokens looked up in the prefix cache.", True, True,
        ("gpu_prefix_cache_queries",),
    ),
    Reading(
        "prefix_cache_hits", "prefix_hits", "Prompt tokens found in the prefix cache.", True, True,
        ("gpu_prefix_cache_hits",),
    ),
    Reading("num_preemptions", "num_preemptions", "Sequences that had to give their blocks back.", True, True),
    Reading("prompt_tokens", "num_prompt_tokens", "Prompt tokens computed.", True, True),
    Reading("generation_tokens", "num_output_tokens", "Tokens generated.", True, True),
    Reading("steps", "num_steps", "Steps run.", True),
    Reading("seconds_since_step", "last_step_s", "Seconds since a step ended."),
    Reading("sequences_admitted", "admitted", "Sequences that entered the engine.", True),
    Reading("sequences_finished", "finished", "Sequences that ended.", True),
    Reading("schedule_seconds", "schedule_s", "Time spent planning steps.", True),
    Reading("commit_seconds", "commit_s", "Time spent taking results in.", True),
    Reading("publish_seconds", "publish_s", "Time spent making text of results.", True),
    Reading("wait_seconds", "wait_s", "Time spent waiting for the device.", True),
    Reading("nonfinite", "num_nonfinite", "Sequences that ended because the model's numbers were not finite.", True),
    Reading("out_of_memory", "num_out_of_memory", "Steps that found no memory and were computed again.", True),
    Reading("forward_seconds", "forward_s", "Time that steps took on the executor.", True),
    Reading("context_tokens", "num_context_tokens", "Positions of KV read by steps, added up over their rows.", True),
)  # fmt: skip

# of each adapter that is known: what is published as `llmd_adapter_<name>`, the field of AdapterInfo, what it is
ADAPTER_READINGS = {
    "loads": ("num_loads", "Times that an adapter's files were read."),
    "slot_loads": ("num_slot_loads", "Times that an adapter was put into a slot on the device."),
    "evictions": ("num_evictions", "Times that an adapter gave its slot to another."),
    "wait_seconds": ("wait_s", "Time that an adapter's sequences waited from their arrival for a row."),
}

# what vLLM publishes and llmd has no use for: preempted sequences are computed again, not swapped
ALWAYS_ZERO = {
    "num_requests_swapped": "Sequences swapped to host memory: none, they are computed again.",
    "cpu_cache_usage_perc": "Share of host KV blocks in use: there is no such pool.",
}

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_REQUEST_S = (
    0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000)

HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From the request's arrival to its first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Between two pieces of output of one sequence.", _TOKEN_S),
    "request_time_per_output_token_seconds": ("Mean time a token after the first, one figure a request.", _TOKEN_S),
    "e2e_request_latency_seconds": ("From arrival to the end.", _REQUEST_S),
    "request_queue_time_seconds": ("From arrival until a row was given.", _REQUEST_S),
    "request_prefill_time_seconds": ("From the row given to the first token.", _REQUEST_S),
    "request_decode_time_seconds": ("From the first token to the end.", _REQUEST_S),
    "request_inference_time_seconds": ("From the row given to the end.", _REQUEST_S),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a request.", _TOKENS),
    "request_params_n": ("Continuations that a prompt asked for.", (1, 2, 5, 10, 20)),
    "request_params_max_tokens": ("Output tokens that a prompt allowed.", _TOKENS),
}
HISTOGRAM_ALIASES = {"inter_token_latency_seconds": ("time_per_output_token_seconds",)}  # further names of vLLM's

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # powers of two: EngineStats counts by them
