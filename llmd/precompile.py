"""`llmd precompile`: the kernels of a configuration's models, compiled for a GPU that need not be here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from llmd.errors import ConfigError

if TYPE_CHECKING:
    from llmd.model.gpu_target import GpuTarget
    from llmd.model.kernel_warmup import Compiled


class Precompiled(NamedTuple):
    """One model's kernels."""

    model: str
    target: GpuTarget
    compiled: Compiled

    def __str__(self) -> str:
        found = self.compiled
        text = f"{self.model} on {self.target}: {found.num_compiled} kernels compiled, {found.num_known} were there"
        return f"{text}; {found.seconds:.1f} s"


def precompile(
    config_file: str | None,
    device: str = "auto",
    *,
    num_threads: int | None = None,
    started: Callable[[], None] = lambda: None,
) -> Iterator[Precompiled]:
    """Fill Triton's cache (TRITON_CACHE_DIR) for the models of a configuration file; imports torch, loads no weights.

    device: such as sm_90 or gfx942; auto is this machine's.
    started: called when a model's kernels of the first steps are compiled.
    Raises ConfigError for a device or a configuration that is wrong, ModelError for a model that cannot be served.
    """
    from llmd.config_load import load_config
    from llmd.daemon import load_catalog, model_parts, resolve_model
    from llmd.model.gpu_target import find_target, parse_target
    from llmd.model.kernels_ahead import can_compile, mark_of

    target = find_target() if device == "auto" else parse_target(device)
    if target is None:
        raise ConfigError("--device: this machine has no GPU; name the one to compile for, such as sm_90 or gfx942")
    if not can_compile():
        raise ConfigError("kernels cannot be compiled: Triton is not installed, or TRITON_INTERPRET is set")
    config = load_config(config_file)
    catalog = load_catalog(config)
    from llmd.model.kernel_warmup import compile_kernels

    for model in config.models:
        if model.device == "cpu":
            continue
        path = resolve_model(config, catalog, model.model_copy(update={"load_format": "dummy"}))
        parts = model_parts(catalog, config.adapters if model == config.models[0] else None)
        compiled = compile_kernels(
            model, config.cache, config.scheduler, path, parts, target, num_threads=num_threads, started=started
        )
        if not compiled.failures:
            mark_of(config, model, path, parts, target).touch()
        yield Precompiled(model.model, target, compiled)
