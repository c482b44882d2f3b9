"""The engine in a program of one's own, without HTTP: LLM for scripts and notebooks, AsyncLLM for asyncio programs."""

from llmd.offline.adapters import LoRARequest
from llmd.offline.async_llm import AsyncLLM
from llmd.offline.beams import BeamSearchOutput, BeamSearchSequence
from llmd.offline.llm import LLM
from llmd.offline.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    PoolingOutput,
    PoolingRequestOutput,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    ScoringOutput,
    ScoringRequestOutput,
)

__all__ = [
    "LLM", "AsyncLLM", "BeamSearchOutput", "BeamSearchSequence", "ClassificationOutput", "ClassificationRequestOutput",
    "CompletionOutput", "EmbeddingOutput", "EmbeddingRequestOutput", "LoRARequest", "Logprob", "PoolingOutput",
    "PoolingRequestOutput", "RequestMetrics", "RequestOutput", "RequestOutputKind", "ScoringOutput", "ScoringRequestOutput",
]  # fmt: skip
