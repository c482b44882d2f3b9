"""`llmd plan`: what each model of a configuration will take and reach, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from llmd.checks import find_source
from llmd.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from llmd.config import Config, ModelConfig
    from llmd.model.footprint import Footprint
    from llmd.plugin.catalog import Catalog

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes of "141GB", "80 GiB" or "16000000000". Raises ConfigError for anything else."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not (size := int(float(match[1]) * unit)):
        raise ConfigError(f"--device-memory: {text!r} is no size; write 141GB, 80GiB or bytes")
    return size


def reckon_models(
    config: Config, catalog: Catalog, *, device_bytes: int | None = None, measure: bool | None = None
) -> Iterator[Footprint]:
    """Each model's footprint; imports torch, loads no weights. Raises ModelError for a model that does not fit.

    `measure` the memory bandwidth of a device that is here: None does on a CPU, in 0.2 s.
    """
    from llmd.daemon import model_parts
    from llmd.model.footprint import reckon

    parts = model_parts(catalog, config.adapters)
    for model in config.models:
        source = find_source(catalog, model)
        if source is None:
            raise ConfigError(f"models.model: {model.model!r} is claimed by no model source")
        path = source.resolve(_without_weights(model), lambda progress: None)
        footprint = reckon(config, model, path, parts, device_bytes=device_bytes)
        wants = footprint.device == "cpu" if measure is None else measure
        yield replace(footprint, bandwidth=_bandwidth(footprint, model)) if wants and device_bytes is None else footprint


def _without_weights(model: ModelConfig) -> ModelConfig:
    """A hub model's config and tokenizer are enough: gigabytes are not fetched for a plan."""
    return model.model_copy(update={"load_format": "dummy"})


def _bandwidth(footprint: Footprint, model: ModelConfig) -> float | None:
    import torch

    from llmd.model.bandwidth import host_bandwidth, memory_bandwidth
    from llmd.model.cpu_threads import choose_threads

    if footprint.device == "cpu":
        return host_bandwidth(choose_threads(model.cpu_threads, model.cpu_affinity))
    return memory_bandwidth(torch.device(footprint.device))


_RATES = ("max_decode_rate", "decode_limit", "likely_decode_rate")


def plain(footprint: Footprint) -> dict[str, Any]:
    """Everything, for programs."""
    return {**asdict(footprint), **{name: getattr(footprint, name) for name in _RATES}}


def describe(footprint: Footprint, max_num_seqs: int) -> Iterator[str]:
    """One model's table, the arithmetic from top to bottom."""
    from llmd.model.kv_tensors import show

    quantization = f", {footprint.quantization}" if footprint.quantization else ""
    yield f"{footprint.model}: {footprint.architecture}, {footprint.dtype}{quantization}, on {footprint.device}"
    rows = [("weights", show(footprint.weights_bytes), "")]
    if footprint.adapter_bytes:
        rows.append(("adapter slots", show(footprint.adapter_bytes), ""))
    rows.append(("activations", show(footprint.activation_bytes), "of the largest step, estimated"))
    if footprint.device_bytes is not None:
        rows.insert(0, ("device", show(footprint.device_bytes), "of which cache.gpu_memory_utilization is used"))
    if footprint.state_bytes:
        rows.append(("states", show(footprint.state_bytes), f"{show(footprint.state_bytes // max_num_seqs)} for each row"))
    if footprint.kv_bytes_per_token:
        per_token = f"{footprint.num_blocks} blocks; {show(footprint.kv_bytes_per_token)} a token"
        rows.append(("KV pool", show(footprint.pool_bytes), per_token))
        rows.append(("tokens", f"{footprint.num_tokens:,}", f"context of {footprint.max_model_len:,}"))
        rows.append(("sequences", f"{footprint.num_sequences:,}", f"of full length; at most {max_num_seqs} run at once"))
    rows += _bandwidth_rows(footprint)
    for name, value, note in rows:
        yield f"  {name:<14}{value:>14}  {note}".rstrip()
    yield f"  attention by {footprint.attention_backend}"


def _bandwidth_rows(footprint: Footprint) -> Iterator[tuple[str, str, str]]:
    """The roofline, and what of it will be reached."""
    from llmd.engine.roofline import CONTEXT
    from llmd.model.kv_tensors import show

    if not footprint.bandwidth or not footprint.max_decode_rate:
        return
    ceiling = f"{footprint.max_decode_rate:,.1f} tok/s for one sequence at most: {show(footprint.step_bytes)} a token"
    yield "bandwidth", f"{footprint.bandwidth / 1e9:.1f} GB/s", ceiling
    if footprint.decode_limit:
        kv = show(CONTEXT * footprint.kv_bytes_per_token)
        yield "at a context", f"{CONTEXT:,}", f"{footprint.decode_limit:,.1f} tok/s at most: {kv} of KV on top"
    if footprint.likely_decode_rate and footprint.decode_limit:
        share = 100 * footprint.likely_decode_rate / footprint.decode_limit
        note = f"estimated: {share:.0f} % of that, as was seen with weights of {footprint.weight_bits:.0f} bits"
        yield "likely", f"{footprint.likely_decode_rate:,.1f} tok/s", note


def check_fits(footprint: Footprint, wanted: int | None) -> None:
    """Raise ModelError where the context that the configuration asks for does not fit the pool."""
    if footprint.kv_bytes_per_token and footprint.num_tokens < (wanted or 1):
        raise ModelError(
            f"{footprint.model}: max_model_len {wanted or 1} does not fit: the KV pool holds {footprint.num_tokens} tokens"
        )
