"""What a loaded model tells the engine and its operators of itself."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from llmd.engine.executor import ExecutorInfo, KVGroup
from llmd.model.bandwidth import memory_bandwidth
from llmd.model.footprint import step_bytes, weight_bits
from llmd.model.memory_room import show
from llmd.model.states import row_bytes

if TYPE_CHECKING:
    from llmd.model.loader import LoadedModel
    from llmd.model.runner import Runner

log = logging.getLogger("llmd.model")


def executor_info(runner: Runner, elapsed_s: float) -> ExecutorInfo:
    """All of it, once the runner has loaded in so many seconds; the log has the gist and the sum of the memory."""
    model, adapters, parts = runner.model, runner.adapters, runner.parts
    log.info(
        "loaded in %.1f s: weights %s, KV pool %s (%d blocks of %s), context %d, attention %s, %s on %s",
        elapsed_s, show(model.weights_bytes), show(runner.kv.num_bytes), runner.num_blocks, _name(runner.kv.dtype),
        runner.max_model_len, model.backend_name, model.dtype, runner.device,
    )  # fmt: skip
    max_rows = runner.rows.max_num_rows
    if runner.states.num_bytes:
        log.info("states of %d rows: %s", max_rows, show(runner.states.num_bytes))
    return ExecutorInfo(
        num_blocks=runner.num_blocks,
        block_size=runner.rows.block_size,
        max_num_seqs=max_rows,
        max_model_len=runner.max_model_len,
        vocab_size=model.config.vocab_size,
        kv_groups=_kv_groups(model),
        needs_whole_prompts=model.is_encoder,
        can_generate=runner.can_generate,
        pooling=getattr(model.module, "pooling", "last"),
        embedding_size=runner.embedding_size,
        labels=model.config.labels if hasattr(model.module, "classify") else (),
        weights_bytes=model.weights_bytes,
        kv_bytes=runner.kv.num_bytes,
        max_loras=adapters.num_slots,
        max_cpu_loras=parts.adapters.host_slots if parts.adapters and adapters.num_slots else 0,
        device=str(runner.device),
        attention_backend=model.backend_name,
        facts={
            "architecture": model.config.architectures[0],
            "dtype": _name(model.dtype),
            "kv_cache_dtype": _name(runner.kv.dtype),
            "quantization": model.quantization,
            "load_s": elapsed_s,
            "step_bytes": step_bytes(model.module),
            "weight_bits": weight_bits(model.module),
            "adapter_slots_bytes": adapters.num_bytes,
            "memory": runner.memory_account().told(log),
            "memory_bandwidth": memory_bandwidth(runner.device) if runner.device.type == "cuda" else None,
        },
    )


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _kv_groups(model: LoadedModel) -> tuple[KVGroup, ...]:
    if model.is_encoder:
        return ()
    blocks = KVGroup(num_layers=model.num_kv_layers)
    if not model.states:
        return (blocks,)
    return blocks, KVGroup(name="state", kind="state", num_layers=len(model.states), row_bytes=row_bytes(model.states))
