"""256 requests at once through the whole engine, with lengths as people's conversations have them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import write_model
from llmd import LLM, SamplingParams

_MEDIANS = 110, 170  # tokens of prompts and answers; lognormal, as ShareGPT's are nearly
_SIGMAS = 1.2, 0.9
_MAX_LEN = 1024


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    return {"requests": lambda: requests(setting)}


def lengths(count: int, most: int, seed: int = 0) -> list[tuple[int, int]]:
    """Tokens of prompt and answer of each request."""
    chance = random.Random(seed)

    def one(which: int) -> int:
        drawn = chance.lognormvariate(0.0, _SIGMAS[which]) * _MEDIANS[which]
        return max(4, min(most // 2, int(drawn)))

    return [(one(0), one(1)) for _ in range(count)]


def requests(setting: Setting) -> dict[str, Any]:
    """Output tokens a second, and the CPU's part."""
    count, most = (4, 32) if setting.is_tiny else (256, _MAX_LEN)
    config = write_model(setting.folder / "model", setting.model, is_tiny=setting.is_tiny)
    room: dict[str, Any] = {"kv_cache_memory_bytes": 16 << 20} if setting.is_tiny else {}
    llm = LLM(
        model=str(setting.folder / "model"), dtype="bfloat16", device=setting.device.type, load_format="dummy",
        max_model_len=most, max_num_seqs=count, **room,
    )  # fmt: skip
    wanted, chance = lengths(count, most), random.Random(1)

    def prompts() -> list[Any]:
        return [{"prompt_token_ids": [chance.randrange(config["vocab_size"]) for _ in range(num)]} for num, _ in wanted]

    params = [SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True, detokenize=False) for _, num in wanted]
    start = time.perf_counter()
    llm.generate(prompts(), params, use_tqdm=False)  # whatever is still compiled or captured
    first, given = time.perf_counter() - start, prompts()
    start, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(given, params, use_tqdm=False)
    elapsed, busy = time.perf_counter() - start, time.process_time() - cpu
    llm.shutdown()
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "output_tokens_s": round(num_tokens / elapsed, 1),
        "first_output_tokens_s": round(num_tokens / first, 1),
        "input_tokens": sum(num for num, _ in wanted),
        "output_tokens": num_tokens,
        "s": round(elapsed, 3),
        "cpu_share": round(busy / elapsed, 3),
    }
