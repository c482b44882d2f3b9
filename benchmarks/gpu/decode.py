"""A model end to end below the engine: start, decode by number of rows, and a long prompt; shares of the ceilings."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import Model
from llmd.engine.params import SamplingParams

_ROWS = (1, 8, 64, 256)
_GREEDY = SamplingParams(temperature=0.0, max_tokens=4096)
_DRAWN = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=4096)


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    context, steps = (20, 3) if setting.is_tiny else (512, 40)
    rows = (1, 3) if setting.is_tiny else _ROWS

    @cache
    def model() -> Model:
        return Model(setting, max(rows), context + 2 * steps)

    found: dict[str, Callable[[], dict[str, Any]]] = {"start": lambda: start(model())}
    for num in rows:
        found[f"decode {num}"] = lambda num=num: decode(setting, model(), num, context, steps, _GREEDY)  # type: ignore[misc]
    found[f"decode {rows[-2]}, top_p"] = lambda: decode(setting, model(), rows[-2], context, steps, _DRAWN)
    found["prefill 8k"] = lambda: prefill(setting, model())
    return found


def start(model: Model) -> dict[str, Any]:
    """From nothing to a model that is warm."""
    return {"load_s": round(model.load_s, 2), "weights_gb": round(model.info.weights_bytes / 1e9, 3)}


def decode(
    setting: Setting, model: Model, num_rows: int, context: int, steps: int, params: SamplingParams
) -> dict[str, Any]:
    """Tokens a second, what that reads and computes, and what it costs the CPU."""
    timing = model.decode(num_rows, context, steps, params)
    step_bytes = int(model.info.facts["step_bytes"])
    gb_s = (step_bytes + num_rows * context * model.kv_token_bytes) / timing.ms / 1e6
    tflop_s = num_rows * (step_bytes + attention_flops(model, 1, context)) / timing.ms / 1e9
    return {
        "tokens_s": round(1e3 * num_rows / timing.ms, 1),
        "ms": round(timing.ms, 3),
        "launch_ms": round(timing.launch_ms, 3),
        "MBU": setting.share("copy_gb_s", gb_s),
        "MFU": setting.share("matmul_tflop_s", tflop_s),
    }


def prefill(setting: Setting, model: Model) -> dict[str, Any]:
    """One prompt of the longest that fits a step."""
    num_tokens = model.max_len - 1
    timing = model.prefill(num_tokens, 2 if setting.is_tiny else 5)
    step_bytes = int(model.info.facts["step_bytes"])
    layers = num_tokens * (step_bytes - head_bytes(model)) + attention_flops(model, num_tokens, num_tokens) // 2
    tflop_s = (layers + head_bytes(model)) / timing.ms / 1e9  # one token has logits
    return {
        "tokens_s": round(1e3 * num_tokens / timing.ms, 1),
        "ms": round(timing.ms, 3),
        "launch_ms": round(timing.launch_ms, 3),
        "MBU": setting.share("copy_gb_s", step_bytes / timing.ms / 1e6),
        "MFU": setting.share("matmul_tflop_s", tflop_s),
    }


def head_bytes(model: Model) -> int:
    """Of the weights that make logits, in bf16."""
    return int(2 * model.config["vocab_size"] * model.config["hidden_size"])


def attention_flops(model: Model, num_queries: int, context: int) -> int:
    """Both products of all layers: two operations for each query, position and dim. Weights in bf16 cost one a byte."""
    return 4 * model.config["num_hidden_layers"] * model.config["hidden_size"] * num_queries * context
