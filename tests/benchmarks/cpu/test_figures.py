"""Medians, ratios, shares and limits from samples."""

import pytest

from benchmarks.cpu.figures import equal_first, median, ratios_of_rounds, summarize, weight_bytes
from benchmarks.cpu.found import Found, Key, Plan, Sample
from benchmarks.cpu.models import QWEN2_05B

PLAN = Plan(engines={}, works=["decode"], options={"kv_bytes": 100})


def samples(*values, noisy=()):
    return [Sample(i, value, is_noisy=i in noisy) for i, value in enumerate(values, 1)]


def test_the_median_is_that_of_quiet_rounds():
    assert median(samples(10, 30, 20)) == 20
    assert median(samples(10, 30, 20, noisy={1})) == 25
    assert median(samples(10, 30, 20, noisy={1, 2, 3})) == 20


def test_ratios_are_of_the_rounds_that_both_have():
    ours, theirs = samples(10.0, 20.0, 30.0), [Sample(1, 5.0), Sample(3, 10.0)]
    assert ratios_of_rounds("decode", ours, theirs) == [2.0, 3.0]
    assert ratios_of_rounds("start", ours, theirs) == [0.5, pytest.approx(1 / 3)]


def test_first_tokens_are_compared_by_round():
    ours = [Sample(1, 1.0, first=[1, 2]), Sample(2, 1.0, first=[3, 4])]
    assert equal_first(ours, [Sample(2, 1.0, first=[3, 5])]) == 0.5
    assert equal_first(ours, [Sample(2, 1.0)]) is None
    assert equal_first(ours, [Sample(3, 1.0, first=[1])]) is None


@pytest.mark.parametrize(("model_format", "megabytes"), [("bf16", 988), ("int8", 494), ("int4", 315)])
def test_bytes_of_the_model(model_format, megabytes):
    assert weight_bytes(QWEN2_05B, model_format) / 1e6 == pytest.approx(megabytes, abs=1)


def test_the_best_peer_is_the_one_that_llmd_leads_least():
    found = Found(bandwidths={("bf16", i): 40e9 for i in (1, 2, 3)})
    for name, values in {"llmd": (33.0, 30.0, 36.0), "llama.cpp": (30.0, 33.0, 27.0), "openvino": (22.0,)}.items():
        found.samples[Key("bf16", "decode", name)] = samples(*values)
    told = summarize(found, PLAN, QWEN2_05B)["formats"]["bf16"]["decode"]
    assert (told["best_peer"], told["ratio"]) == ("llama.cpp", pytest.approx(1.1))
    assert told["engines"]["llama.cpp"]["llmd_is_times_better_in_rounds"] == pytest.approx([1.1, 30 / 33, 36 / 27])
    assert told["engines"]["openvino"]["llmd_is_times_better"] == pytest.approx(1.5)
    assert told["engines"]["llmd"]["share_of_bandwidth"] == pytest.approx(33 * 0.988 / 40, rel=0.001)


def test_less_is_better_in_seconds_and_bytes():
    found = Found()
    for work in ("start", "memory"):
        found.samples[Key("int8", work, "llmd")] = samples(2.0)
        found.samples[Key("int8", work, "openvino")] = samples(3.0)
        found.samples[Key("int8", work, "llama.cpp")] = samples(1.0)
    formats = summarize(found, PLAN, QWEN2_05B)["formats"]["int8"]
    assert [(formats[work]["best_peer"], formats[work]["ratio"]) for work in ("start", "memory")] == [("llama.cpp", 0.5)] * 2
    assert formats["memory"]["limit_bytes"] == pytest.approx(1.3 * 494e6 + 100 + 400e6, rel=0.001)


def test_noisy_rounds_are_named():
    found = Found()
    found.samples[Key("bf16", "many16", "llmd")] = samples(1.0, 2.0, noisy={2})
    told = summarize(found, PLAN, QWEN2_05B)["formats"]["bf16"]["many16"]
    assert told["engines"]["llmd"]["noisy_rounds"] == [2]
    assert "ratio" not in told
