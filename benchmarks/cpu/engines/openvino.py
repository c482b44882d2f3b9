"""OpenVINO GenAI's continuous batching on a model that `optimum-cli export openvino` wrote."""

from __future__ import annotations

from typing import Any

from . import Generated

_BLOCK_TOKENS = 32  # of the KV cache on a CPU
_TOKEN_BYTES = 24 * 2 * 2 * 64 * 2  # 24 layers, keys and values, 2 heads of 64, bf16


class Engine:
    """The weights' format is that of the export; products are computed in bf16 where the CPU can."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = options["kv_bytes"] // (_BLOCK_TOKENS * _TOKEN_BYTES)
        scheduler.max_num_seqs = options["max_num_seqs"]
        scheduler.max_num_batched_tokens = options["max_model_len"]
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": options["threads"], "INFERENCE_PRECISION_HINT": "bf16"}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def facts(self) -> dict[str, Any]:
        """Versions."""
        import openvino_genai

        return {"version": openvino_genai.__version__}

    def prepare(self, num_seqs: int, max_len: int) -> None:
        """Nothing depends on the work."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Generated:
        """One call with all prompts."""
        import numpy
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_tokens, True, False
        inputs = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        results = self._pipeline.generate(inputs, [config] * len(inputs))
        return Generated.of([result.m_generation_ids[0] for result in results])

    def close(self) -> None:
        """Free the model."""
        del self._pipeline
