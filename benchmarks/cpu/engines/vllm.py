"""vLLM built for CPUs, offline."""

from __future__ import annotations

import os
from typing import Any

from . import Generated


class Engine:
    """bf16, with what vLLM compiles by default."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        cpus = sorted(os.sched_getaffinity(0))[: options["threads"]]
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: the least it takes
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        from vllm import LLM

        self._llm = LLM(
            model=model,
            dtype="bfloat16",
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_num_seqs"],
            enable_prefix_caching=False,
        )

    def facts(self) -> dict[str, Any]:
        """Versions."""
        import torch
        import vllm

        return {"version": vllm.__version__, "torch": torch.__version__}

    def prepare(self, num_seqs: int, max_len: int) -> None:
        """Nothing depends on the work."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Generated:
        """One call with all prompts."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return Generated.of([output.outputs[0].token_ids for output in outputs])

    def close(self) -> None:
        """The process ends with it."""
