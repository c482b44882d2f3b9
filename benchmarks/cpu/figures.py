"""From the samples of all rounds to medians, ratios and a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .engine_list import LLMD, LLMD_FRESH, LLMD_HTTP
from .found import Found, Plan, Sample, better
from .works import HTTP, MEMORY, UNITS

_HEADER = ("work", "engine", "median", "unit", "llmd is", "in rounds", "share", "others")
_GIB = 1 << 30


def median(samples: Sequence[Sample]) -> float:
    """Of their values, those of a quiet machine where there is any."""
    return statistics.median([sample.value for sample in samples if not sample.is_noisy] or [s.value for s in samples])


def ratios_of_rounds(work: str, ours: Sequence[Sample], theirs: Sequence[Sample]) -> list[float]:
    """How many times better ours is, in each round that both have."""
    of_round = {sample.round: sample.value for sample in theirs}
    return [better(work, sample.value, of_round[sample.round]) for sample in ours if sample.round in of_round]


def equal_first(ours: Sequence[Sample], theirs: Sequence[Sample]) -> float | None:
    """Share of the prompts for which both began with the same token; None where one does not tell."""
    of_round = {sample.round: sample.first for sample in theirs}
    pairs = [pair for sample in ours for pair in zip(sample.first, of_round.get(sample.round, ()), strict=False)]
    return statistics.mean(left == right for left, right in pairs) if pairs else None


def weight_bytes(config: Mapping[str, Any], model_format: str) -> int:
    """Bytes of weights that a decode step reads, scales aside; int4 keeps the embedding, the head too, in 8 bits."""
    from .models import tensor_shapes

    bits = {"bf16": (16, 16), "int8": (8, 8), "int4": (4, 8)}[model_format]
    matrices = {name: shape[0] * shape[1] for name, shape in tensor_shapes(config) if len(shape) == 2}
    return sum(size * bits["embed" in name] for name, size in matrices.items()) // 8


def _engine(work: str, samples: Sequence[Sample], bandwidths: Mapping[int, float], read_bytes: int) -> dict[str, Any]:
    told: dict[str, Any] = {
        "median": median(samples),
        "rounds": [sample.value for sample in samples],
        "foreign_cpu": [round(sample.foreign, 4) for sample in samples],
        "waited_s": [round(sample.waited_s, 1) for sample in samples],
    }
    if noisy := [sample.round for sample in samples if sample.is_noisy]:
        told["noisy_rounds"] = noisy
    if work == "decode":
        shares = [sample.value * read_bytes / bandwidths[sample.round] for sample in samples]
        told["share_of_bandwidth"] = statistics.median(shares)
    return told


def _compare(work: str, engines: dict[str, dict[str, Any]], samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """llmd beside each other engine: of HTTP, the server beside what runs in process."""
    ours = LLMD_HTTP if work == HTTP else LLMD
    if ours not in engines:
        return {}
    others = [name for name in engines if name != ours]
    for name in others:
        engines[name]["llmd_is_times_better"] = better(work, engines[ours]["median"], engines[name]["median"])
        engines[name]["llmd_is_times_better_in_rounds"] = ratios_of_rounds(work, samples[ours], samples[name])
        if (share := equal_first(samples[ours], samples[name])) is not None:
            engines[name]["same_first_tokens"] = share
    peers = [name for name in others if name != LLMD_FRESH]
    if not peers:
        return {}
    best = min(peers, key=lambda name: engines[name]["llmd_is_times_better"])
    return {"best_peer": best, "ratio": engines[best]["llmd_is_times_better"]}


def summarize(found: Found, plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """All figures by format and work."""
    formats: dict[str, dict[str, Any]] = {}
    for model_format, work in found.pairs():
        samples = found.of(model_format, work)
        bandwidths = {number: speed for (named, number), speed in found.bandwidths.items() if named == model_format}
        read_bytes = weight_bytes(config, model_format)
        engines = {name: _engine(work, taken, bandwidths, read_bytes) for name, taken in samples.items()}
        told = {"unit": UNITS[work], **_compare(work, engines, samples), "engines": engines}
        if work == MEMORY:
            told["limit_bytes"] = int(1.3 * read_bytes) + plan.options["kv_bytes"] + 400_000_000
        formats.setdefault(model_format, {"weight_bytes": read_bytes})[work] = told
    return {
        "formats": formats,
        "bandwidth_bytes_per_s": {f"{named} {number}": int(speed) for (named, number), speed in found.bandwidths.items()},
        "engines": found.facts,
        "failures": found.failures,
        "notes": found.notes,
    }


# --- what people read


def _shown(value: float, unit: str) -> tuple[str, str]:
    return (f"{value / _GIB:.2f}", "GiB") if unit == "bytes" else (f"{value:.2f}", unit)


def _row(work: str, unit: str, name: str, told: Mapping[str, Any]) -> tuple[str, ...]:
    ratio, share = told.get("llmd_is_times_better"), told.get("share_of_bandwidth")
    return (
        work,
        name,
        *_shown(told["median"], unit),
        "" if ratio is None else f"{ratio:.2f}x",
        " ".join(f"{value:.2f}" for value in told.get("llmd_is_times_better_in_rounds", ())),
        "" if share is None else f"{share:.0%}",
        f"{max(told['foreign_cpu']):.0%}{' noisy' if 'noisy_rounds' in told else ''}",
    )


def _rows(works: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for work, told in works.items():
        if isinstance(told, dict):
            for name, engine in told["engines"].items():
                yield _row(work, told["unit"], name, engine)


def table(figures: Mapping[str, Any]) -> list[str]:
    """A table for each format; `llmd is` tells how many times better llmd is than that engine."""
    lines = []
    for model_format, works in figures["formats"].items():
        rows = [_HEADER, *_rows(works)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        lines += ["", model_format]
        lines += ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines
