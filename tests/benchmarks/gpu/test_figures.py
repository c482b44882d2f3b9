"""What is asked, where it is found, and what the tables say of it."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import ceilings, decode, device_tests, figures, kernels, loop, serve, small, start, table, trace
from benchmarks.gpu.figures import FIGURES, Figure
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.setting import Setting

MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (ceilings, decode, device_tests, kernels, loop, serve, small, start, trace)
}


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.part}, {figure.case}, {figure.name}")
def test_every_figure_has_a_case(figure):
    pytest.importorskip("triton")
    part = next(part for part in PARTS if part.name == figure.part)
    cases = MODULES[part.module].cases(Setting(torch.device("cuda"), False, part.model, Path(), {}))
    assert figure.case in cases


def test_every_part_is_one_of_these_modules():
    assert {part.module for part in PARTS} == set(MODULES)


def test_the_bounds_are_those_that_are_asked_for():
    asked = {figure.words: figure.asked() for figure in FIGURES}
    assert asked["7B, batch 1: of copy"] == "≥ 0.85"
    assert asked["7B, batch 64: of copy"] == "≥ 0.75"
    assert asked["7B, prefill of 8k: of the product"] == "≥ 0.6"
    assert asked["attention, 64 × 2k of 7B: of copy"] == "≥ 0.9"
    assert asked["paged prefill of 8k, 7B: of torch's on contiguous input"] == "≥ 0.65"
    assert asked["CPU of loop thread and executor a step, batch 64: ms"] == "≤ 1"
    assert asked["GPU idle between steps: share"] == "≤ 0.03"
    assert asked["0.5B, 256 requests: output tokens/s"] == "≥ 20,000"
    assert asked["7B, start to READY, nothing to read: s"] == "≤ 10"


def test_a_figure_is_met_or_not_or_not_there(monkeypatch):
    wanted = (
        Figure("p", "a", "x", "at least", at_least=2),
        Figure("p", "a", "y", "at most", at_most=1),
        Figure("p", "a", "z", "no bound"),
        Figure("p", "b", "x", "broken", at_least=2),
        Figure("p", "c", "x", "unreached", at_least=2),
        Figure("q", "a", "x", "dropped", at_least=2),
        Figure("r", "a", "x", "not chosen", at_least=2),
        Figure("p", "a", "none", "not measured", at_least=2),
    )
    monkeypatch.setattr(figures, "FIGURES", wanted)
    results = [
        {"part": "p", "case": "a", "figures": {"x": 2.0, "y": 1.5, "z": 7, "none": None}},
        {"part": "p", "case": "b", "error": "ValueError: | no"},
        {"part": "p", "case": "the rest", "dropped": "1 s were left"},
        {"part": "q", "case": "all", "dropped": "0 s were left"},
    ]
    assert [(verdict.got, verdict.met) for verdict in figures.judge(results)] == [
        (2.0, "yes"), (1.5, "NO"), (7.0, ""), *[(None, "no figure")] * 5,
    ]  # fmt: skip
    lines = table.figures(results).splitlines()
    assert lines[2:4] == ["| at least | ≥ 2 | 2 | yes |", "| at most | ≤ 1 | 1.5 | NO |"]
    assert "| broken | ≥ 2 | ValueError: / no | no figure |" in lines
    assert "| dropped | ≥ 2 | 0 s were left | no figure |" in lines
    assert "| not chosen | ≥ 2 | not run | no figure |" in lines
    assert lines[-1] == "| no bound | – | 7 |  |"
