"""`llmd plan`: what each model of a configuration will take and reach, before anything is loaded."""

from __future__ import annotations

import re
from collections import Counter
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


def parse_size(text: str, option: str = "--device-memory", like: str = "141GB, 80GiB or bytes") -> int:
    """Bytes of "141GB", "80 GiB" or "16000000000". Raises ConfigError for anything else."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not (size := int(float(match[1]) * unit)):
        raise ConfigError(f"{option}: {text!r} is no size; write {like}")
    return size


def parse_rate(text: str) -> int:
    """Bytes a second of "4.3TB/s" or "900 GB". Raises ConfigError for anything else."""
    return parse_size(text.removesuffix("/s"), "--device-bandwidth", "4.3TB/s or 900GB/s")


def reckon_models(
    config: Config,
    catalog: Catalog,
    *,
    device_bytes: int | None = None,
    bandwidth: float | None = None,
    measure: bool | None = None,
) -> Iterator[Footprint]:
    """Each model's footprint; imports torch, loads no weights. Models on one GPU are neighbours, in the order they load.

    A GPU's footprint that does not `fit` brings suggestions; this machine raises ModelError. `bandwidth`: bytes a second of
    the GPU. `measure` that of a device that is here: None does on a CPU, in 0.2 s.
    """
    from llmd.daemon import model_parts
    from llmd.model.footprint import reckon
    from llmd.plan_advice import suggestions

    taken: Counter[str] = Counter()  # bytes by GPU
    for index, model in enumerate(config.models):
        source = find_source(catalog, model)
        if source is None:
            raise ConfigError(f"models.model: {model.model!r} is claimed by no model source")
        path = source.resolve(_without_weights(model), lambda progress: None)
        parts = model_parts(catalog, None if index else config.adapters)  # they change the default model
        size = device_bytes if model.gpu else None
        device, here = model.gpu, config.model_copy(update={"cache": config.cache_of(model)})
        footprint = reckon(here, model, path, parts, device_bytes=size, others_bytes=taken[device])
        if footprint.device != "cpu":
            if why_not(footprint, model):
                found = suggestions(here, model, path, parts, footprint, others_bytes=taken[device])
                footprint = replace(footprint, suggestions=tuple(found))
            taken[device] += footprint.taken_bytes
        is_cpu = footprint.device == "cpu"
        rate = None if is_cpu else bandwidth
        if rate is None and size is None and (is_cpu if measure is None else measure):
            rate = _bandwidth(footprint, model)
        yield replace(footprint, bandwidth=rate)


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


_DERIVED = (
    "pool_bytes", "kv_bytes_per_token", "num_tokens", "num_sequences", "taken_bytes", "missing_bytes", "max_decode_rate",
    "decode_limit", "batch_decode_limit", "num_batch_rows", "likely_decode_rate",
)  # fmt: skip


def plain(footprint: Footprint) -> dict[str, Any]:
    """Everything, for programs."""
    return {**asdict(footprint), **{name: getattr(footprint, name) for name in _DERIVED}}


def describe(footprint: Footprint) -> Iterator[str]:
    """One model's table, the arithmetic from top to bottom."""
    quantization = f", {footprint.quantization}" if footprint.quantization else ""
    yield f"{footprint.model}: {footprint.architecture}, {footprint.dtype}{quantization}, on {footprint.device}"
    yield from map(str, footprint.rows())
    for name, value, note in _bandwidth_rows(footprint):
        yield f"  {name:<14}{value:>14}  {note}".rstrip()
    yield f"  attention by {footprint.attention_backend}"


def _bandwidth_rows(footprint: Footprint) -> Iterator[tuple[str, str, str]]:
    """The roofline, and what of it will be reached."""
    from llmd.engine.roofline import CONTEXT
    from llmd.model.kv_tensors import show

    if not footprint.bandwidth or not footprint.max_decode_rate:
        return
    ceiling = f"{footprint.max_decode_rate:,.1f} tok/s for one sequence at most: {show(footprint.token_bytes)} a token"
    yield "bandwidth", f"{footprint.bandwidth / 1e9:,.1f} GB/s", ceiling
    if footprint.decode_limit:
        kv = show(CONTEXT * footprint.kv_bytes_per_token)
        yield "at a context", f"{CONTEXT:,}", f"{footprint.decode_limit:,.1f} tok/s at most: {kv} of KV on top"
    if footprint.device != "cpu" and footprint.batch_decode_limit:
        note = f"{footprint.batch_decode_limit:,.0f} tok/s of all together at most, by memory; arithmetic may allow less"
        yield "such at once", f"{footprint.num_batch_rows:,}", note
    if footprint.likely_decode_rate and footprint.decode_limit:
        share = 100 * footprint.likely_decode_rate / footprint.decode_limit
        note = f"estimated: {share:.0f} % of that, as was seen with weights of {footprint.weight_bits:.0f} bits"
        yield "likely", f"{footprint.likely_decode_rate:,.1f} tok/s", note


def why_not(footprint: Footprint, model: ModelConfig) -> str:
    """What a footprint lacks: memory, or room for the context that the configuration asks for; empty where it fits."""
    from llmd.model.kv_tensors import show

    if footprint.missing_bytes:
        return f"{footprint.arithmetic()} do not fit: {show(footprint.missing_bytes)} are missing"
    wanted = model.max_model_len or 1
    if footprint.kv_bytes_per_token and footprint.num_tokens < wanted:
        return f"max_model_len {wanted} does not fit: the KV pool holds {footprint.num_tokens} tokens"
    return ""


def check_fits(footprint: Footprint, model: ModelConfig) -> None:
    """Raise ModelError for a model that does not fit, with what would."""
    if reason := why_not(footprint, model):
        lines = "".join(f"\n    {line}" for line in footprint.suggestions)
        raise ModelError(f"{footprint.model}: {reason}{'; what would fit:' if lines else ''}{lines}")
