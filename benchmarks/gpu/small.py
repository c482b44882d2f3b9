"""What must hold before a figure means anything: a model runs, graphs give eager's tokens, nothing waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import write_model
from benchmarks.gpu.steps import Model
from llmd import LLM, SamplingParams

_GREEDY = SamplingParams(temperature=0.0, max_tokens=4096)
_DRAWN = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=4096)


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    return {"LLM": lambda: generate(setting), "graphs": lambda: graphs(setting), "no waits": lambda: no_waits(setting)}


def generate(setting: Setting) -> dict[str, Any]:
    """A model of two layers, from the package's front door."""
    write_model(setting.folder / "tiny", setting.model, is_tiny=True)
    with LLM(
        model=str(setting.folder / "tiny"), dtype="bfloat16", device=setting.device.type, load_format="dummy",
        max_model_len=128, max_num_seqs=4, kv_cache_memory_bytes=16 << 20,
    ) as llm:  # fmt: skip
        params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=9, ignore_eos=True, logprobs=2)
        outputs = llm.generate([{"prompt_token_ids": [3, 1, 4, 1, 5]}] * 3, params, use_tqdm=False)
    return {"output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}


def graphs(setting: Setting) -> dict[str, Any]:
    """The share of tokens that replayed graphs and eager steps have in common, for numbers of rows on the ladder."""
    rows, context, steps = ((2, 3), 20, 4) if setting.is_tiny else ((1, 8, 64), 300, 32)
    found: dict[str, list[int]] = {}
    for name in ("graphs", "eager"):
        model = Model(setting, max(rows), context + 2 * steps, enforce_eager=name == "eager")
        drawn = (model.tokens(num, context, steps, params) for num in rows for params in (_GREEDY, _DRAWN))
        found[name] = [token for run in drawn for step in run for token in step]
        model.close()
    same = sum(mine == other for mine, other in zip(found["graphs"], found["eager"], strict=True))
    return {"tokens": len(found["eager"]), "same": round(same / len(found["eager"]), 5)}


def no_waits(setting: Setting) -> dict[str, Any]:
    """Decode steps, two in flight, while torch raises for each call that would wait; the first that does is named."""
    num_rows, context, steps = (3, 20, 4) if setting.is_tiny else (64, 300, 16)
    model = Model(setting, num_rows, context + 2 * steps)
    model.tokens(num_rows, context, steps, _DRAWN)  # compiled and captured
    try:
        model.tokens(num_rows, context, steps, _DRAWN, around=lambda: refusing_waits(setting.device))
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return {"waits": 1, "first": str(error).partition("\n")[0]}
    return {"waits": 0}


@contextlib.contextmanager
def refusing_waits(device: torch.device) -> Iterator[None]:
    """Whatever makes the host wait for the device raises RuntimeError; events may be waited for."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
