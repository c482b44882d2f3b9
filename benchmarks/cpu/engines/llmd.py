"""llmd.LLM over token ids, as a script would use it."""

from __future__ import annotations

from typing import Any

from . import Generated


class Engine:
    """bf16 as the checkpoint holds it; int8 and int4 quantized while loading."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from llmd import LLM

        quantization = {} if options["format"] == "bf16" else {"quantization": options["format"]}
        self._llm = LLM(
            model=model,
            dtype="bfloat16",
            device="cpu",
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_num_seqs"],
            kv_cache_memory_bytes=options["kv_bytes"],
            **quantization,
            **options["settings"],
        )

    def facts(self) -> dict[str, Any]:
        """Versions."""
        import torch

        import llmd

        return {"version": llmd.__version__, "torch": torch.__version__}

    def prepare(self, num_seqs: int, max_len: int) -> None:
        """Nothing depends on the work."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Generated:
        """One call with all prompts."""
        from llmd import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return Generated.of([output.outputs[0].token_ids for output in outputs])

    def close(self) -> None:
        """Free the engine."""
        self._llm.shutdown()
