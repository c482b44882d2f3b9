"""The figures that are asked of a GPU host, where each is found among the results, and whether it is met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One number of one case, and its bound."""

    part: str
    case: str
    name: str
    words: str
    at_least: float | None = None
    at_most: float | None = None

    def asked(self) -> str:
        """The bound, in a few signs."""
        if self.at_least is not None:
            return f"≥ {self.at_least:,g}"
        return "–" if self.at_most is None else f"≤ {self.at_most:,g}"

    def is_met(self, value: float) -> bool | None:
        """None: nothing is asked."""
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.at_most is None else value <= self.at_most


class Verdict(NamedTuple):
    """What became of a figure."""

    figure: Figure
    got: float | None
    why_not: str  # where there is no number

    @property
    def met(self) -> str:
        """In a word."""
        if self.got is None:
            return "no figure"
        return {True: "yes", False: "NO", None: ""}[self.figure.is_met(self.got)]


_SMALL, _LARGE, _LLAMA = "qwen2.5-0.5b", "qwen2.5-7b", "llama-3-8b"
_HEADS = ("0.5B", "7B", "8B")


def _figures() -> Iterable[Figure]:
    yield Figure("ceilings", "copy", "copy_gb_s", "copy, GB/s")
    yield Figure("ceilings", "matmul", "matmul_tflop_s", "bf16 product, TFLOP/s")
    yield Figure("tests", "all", "failed", "tests on the device that fail", at_most=0)
    yield Figure("tests", "all", "passed", "tests on the device that pass", at_least=1)
    for heads in _HEADS:
        yield Figure("kernels", f"decode {heads}, 64 x 2k", "of_copy", f"attention, 64 × 2k of {heads}: of copy", 0.9)
    for what in ("1 x 4k", "8 x 2k", "256 x 512"):
        yield Figure("kernels", f"decode 7B, {what}", "of_copy", f"attention, {what.replace('x', '×')} of 7B: of copy")
    for heads in _HEADS:
        words = f"paged prefill of 8k, {heads}: of torch's on contiguous input"
        yield Figure("kernels", f"prefill {heads}, 8k", "times_torch", words, 0.65)
    yield Figure(f"decode {_LARGE}", "decode 1", "MBU", "7B, batch 1: of copy", 0.85)
    yield Figure(f"decode {_LARGE}", "decode 64", "MBU", "7B, batch 64: of copy", 0.75)
    yield Figure(f"decode {_LARGE}", "prefill 8k", "MFU", "7B, prefill of 8k: of the product", 0.6)
    for model in (_SMALL, _LARGE, _LLAMA):
        for rows in (1, 8, 64, 256):
            yield Figure(f"decode {model}", f"decode {rows}", "tokens_s", f"{model}, batch {rows}: tokens/s")
        yield Figure(f"decode {model}", "prefill 8k", "tokens_s", f"{model}, prefill of 8k: tokens/s")
    yield Figure(f"serve {_SMALL}", "requests", "output_tokens_s", "0.5B, 256 requests: output tokens/s", 20_000)
    words = "CPU of loop thread and executor a step, batch 64: ms"
    yield Figure(f"loop {_SMALL}", "64 rows", "cpu_ms", words, at_most=1.0)
    yield Figure(f"loop {_SMALL}", "64 rows", "idle_between", "GPU idle between steps: share", at_most=0.03)
    yield Figure(f"start {_SMALL}", "first", "ready_s", "0.5B, first start to READY (all kernels compiled): s")
    yield Figure(f"start {_SMALL}", "again", "ready_s", "0.5B, start to READY: s", at_most=10)
    yield Figure(f"start {_LARGE}", "again", "ready_s", "7B, start to READY, nothing to read: s", at_most=10)
    yield Figure("small", "graphs", "same", "tokens of graph replay that are eager's: share", 1.0)
    yield Figure("small", "no waits", "waits", "waits in decode steps with two in flight", at_most=0)
    yield Figure(f"trace {_SMALL}", "decode", "waits", "waits in a profiled decode step", at_most=0)


FIGURES: tuple[Figure, ...] = tuple(_figures())


def judge(results: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Each figure, in order, with what the results say."""
    by_case = {(line["part"], line["case"]): line for line in results}
    return [_verdict(figure, by_case) for figure in FIGURES]


def _verdict(figure: Figure, by_case: Mapping[tuple[str, str], Mapping[str, Any]]) -> Verdict:
    line = by_case.get((figure.part, figure.case))
    for case in (figure.case, "all", "the rest"):
        line = line or by_case.get((figure.part, case))
    if line is None:
        return Verdict(figure, None, "not run")
    value = line.get("figures", {}).get(figure.name)
    if value is None:
        return Verdict(figure, None, str(line.get("error") or line.get("dropped") or "not measured"))
    return Verdict(figure, float(value), "")
