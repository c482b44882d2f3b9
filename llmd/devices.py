"""`llmd check --device`: which device and attention backend each model would take, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmd.checks import find_source
from llmd.errors import ModelError

if TYPE_CHECKING:
    from llmd.config import Config, ModelConfig
    from llmd.plugin.catalog import Catalog


def describe_devices(config: Config, catalog: Catalog) -> Iterator[str]:
    """Lines for each model; imports torch, loads no weights."""
    for model in config.models:
        try:
            yield from _describe(config, catalog, model)
        except ModelError as error:
            yield f"{model.model}: {error}"


def _describe(config: Config, catalog: Catalog, model: ModelConfig) -> Iterator[str]:
    from llmd.daemon import model_parts
    from llmd.model.attention import choose_backend, is_of_kind
    from llmd.model.blueprint import attention_needs, is_encoder, read_model_config, select_device, select_dtype

    source = find_source(catalog, model)
    if source is None or source.check is None:
        yield f"{model.model}: its files are fetched when it is served, so nothing can be said of its attention yet"
        return
    parts = model_parts(catalog)
    architecture = read_model_config(model, source.resolve(model, lambda progress: None), parts)
    device = select_device(model.device)
    dtype = select_dtype(model.dtype, architecture, device)
    cache = config.cache
    needs = attention_needs(
        architecture,
        dtype,
        device,
        block_size=cache.block_size,
        kv_cache_dtype=cache.kv_cache_dtype,
        for_encoder=is_encoder(architecture, parts, model.model_impl),
    )
    yield f"{model.model}: {device}, {needs.dtype}, {needs.num_heads} heads of {needs.head_dim}, {needs.num_kv_heads} for KV"
    backends = {name: spec for name, spec in parts.attention_backends.items() if is_of_kind(spec, needs)}
    choice = choose_backend(needs, parts.attention_backends, model.attention_backend, parts.select_attention_backend)
    for name, spec in sorted(backends.items(), key=lambda item: -item[1].priority):
        if name == choice.name:
            yield f"  attention {name}: {'; '.join(filter(None, ('taken', choice.reason)))}"
            continue
        reason = choice.others.get(name) or ", ".join(spec.build().why_not(needs))
        yield f"  attention {name}: {reason or 'usable, another goes before it'}"
