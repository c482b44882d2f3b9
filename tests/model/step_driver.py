"""Drives a Runner with hand-made StepPlans, and makes tiny models to compare it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmd.api.v1.testing.driver import GREEDY as GREEDY
from llmd.api.v1.testing.driver import StepDriver as StepDriver
from llmd.config import AdaptersConfig, CacheConfig, ModelConfig, SchedulerConfig
from llmd.model.parts import ModelParts
from llmd.model.runner import Runner


def model_parts(**adapters: Any) -> ModelParts:
    """The built-in plugins that a model needs, and slots for adapters where there are settings for them."""
    from llmd_plugins.adapters import peft
    from llmd_plugins.architectures import llama, qwen2, qwen3, transformers
    from llmd_plugins.attention import cpu, reference
    from llmd_plugins.checkpoints import dummy, gguf, safetensors
    from llmd_plugins.quantization import fp8, int4, int8, nf4
    from llmd_plugins.sampling import torch as torch_sampling

    architectures = [spec for plugin in (llama, qwen2, qwen3, transformers) for spec in plugin.llmd_register_architectures()]
    backends = [*cpu.llmd_register_attention_backends(), *reference.llmd_register_attention_backends()]
    formats = [spec for plugin in (dummy, gguf, safetensors) for spec in plugin.llmd_register_checkpoint_formats()]
    return ModelParts(
        architectures={name: spec for spec in architectures for name in spec.architectures},
        attention_backends={spec.name: spec for spec in backends},
        checkpoint_formats={spec.name: spec for spec in formats},
        quantizations={
            spec.name: spec for plugin in (int8, int4, nf4, fp8, gguf) for spec in plugin.llmd_register_quantizations()
        },
        adapter_formats={spec.name: spec for spec in peft.llmd_register_adapter_formats()},
        adapters=AdaptersConfig(enable_lora=bool(adapters), **adapters),
        samplers={spec.name: spec for spec in torch_sampling.llmd_register_samplers()},
    )


def make_runner(
    path: Path,
    *,
    cache: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    adapters: dict[str, Any] | None = None,
    parts: ModelParts | None = None,
    **model: Any,
) -> Runner:
    """A loaded Runner on the CPU, with plugins of its own where they are given."""
    model = {"dtype": "float32", "device": "cpu", "prepacked_cache": False, **model}
    runner = Runner(
        ModelConfig(model=str(path), **model),
        CacheConfig(**{"block_size": 4, "kv_cache_bytes": 8 << 20, **(cache or {})}),
        SchedulerConfig(**{"max_num_seqs": 16, "max_num_batched_tokens": 512, **(scheduler or {})}),
        path,
        parts or model_parts(**(adapters or {})),
    )
    runner.info = runner.load(lambda progress: None)  # type: ignore[attr-defined]
    return runner
