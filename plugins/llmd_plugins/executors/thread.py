"""One device, driven by one thread of this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import ExecutorSpec, head_start, hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from llmd.api.v1 import CacheConfig, Executor, ModelConfig, ModelParts, SchedulerConfig, ThreadExecutor


def _executor_class() -> type[ThreadExecutor]:
    from llmd.api.v1 import ThreadExecutor

    return ThreadExecutor


def _warm_up() -> None:
    """Import torch, which takes longer than all else of the start."""
    _executor_class()


def _build(
    config: ModelConfig, *, path: Path, cache: CacheConfig, scheduler: SchedulerConfig, parts: ModelParts
) -> Executor:
    head_start(config, path, parts)
    return _executor_class()(config, cache, scheduler, path, parts)


@hookimpl
def llmd_register_executors() -> list[ExecutorSpec]:
    """The thread executor."""
    return [ExecutorSpec(name="thread", summary="one device, one thread of this process", build=_build, warm_up=_warm_up)]
