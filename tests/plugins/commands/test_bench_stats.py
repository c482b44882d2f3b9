"""The definitions, on numbers that can be checked by hand."""

import math

import pytest

from llmd_plugins.commands.bench.stats import (
    RequestResult,
    distribution,
    max_concurrent,
    meets,
    parse_goodput,
    samples,
    summarize,
)


def make_result(**fields) -> RequestResult:
    usual = {"num_prompt_tokens": 10, "num_output_tokens": 5, "ttft_s": 0.1, "e2e_s": 0.5, "itls_s": [0.1] * 4}
    return RequestResult(**usual | fields)


def test_tpot_leaves_the_first_token_out():
    assert make_result().tpot_s == pytest.approx(0.1)
    assert make_result(num_output_tokens=1).tpot_s is None
    assert make_result(num_output_tokens=0).tpot_s is None


def test_a_distribution_is_in_milliseconds_with_linear_percentiles():
    found = distribution([0.001, 0.002, 0.003, 0.004], [50, 90, 99.9, 100])
    assert found == pytest.approx(
        {"mean": 2.5, "median": 2.5, "std": math.sqrt(1.25), "p50": 2.5, "p90": 3.7, "p99.9": 3.997, "p100": 4.0}
    )
    assert distribution([], [99]) == {"mean": 0, "median": 0, "std": 0, "p99": 0}


def test_rates_and_counts_are_of_requests_that_ended_well():
    results = [
        make_result(),
        make_result(num_output_tokens=1, ttft_s=0.3, e2e_s=0.3, itls_s=[]),
        make_result(error="HTTP 429: full"),
        make_result(error="HTTP 429: full"),
        make_result(error="the stream ended early"),
    ]
    summary = summarize(results, 2.0, metrics=("ttft", "tpot", "itl", "e2el"), percentiles=(50,))
    assert summary["completed"] == 2
    assert summary["failed"] == 3
    assert summary["failures"] == {"HTTP 429: full": 2, "the stream ended early": 1}
    assert summary["total_input_tokens"] == 20
    assert summary["total_output_tokens"] == 6
    assert summary["request_throughput"] == 1.0
    assert summary["output_throughput"] == 3.0
    assert summary["total_token_throughput"] == 13.0
    assert summary["mean_ttft_ms"] == pytest.approx(200)
    assert summary["mean_tpot_ms"] == pytest.approx(100)
    assert summary["p50_itl_ms"] == pytest.approx(100)
    assert summary["mean_e2el_ms"] == pytest.approx(400)
    assert "request_goodput" not in summary


def test_nothing_that_worked_gives_zeros():
    summary = summarize([make_result(error="x")], 1.0)
    assert summary["completed"] == summary["output_throughput"] == summary["p99_ttft_ms"] == 0


def test_goodput_counts_requests_that_meet_all_objectives():
    results = [make_result(), make_result(ttft_s=0.3), make_result(error="x"), make_result(num_output_tokens=1)]
    assert meets(results[3], {"tpot": 0.0})
    assert summarize(results, 0.5, objectives={"ttft": 200, "tpot": 150})["request_goodput"] == 4.0
    assert summarize(results, 1.0, objectives={"e2el": 499.0})["request_goodput"] == 0.0


def test_goodput_objectives_are_parsed_and_mistakes_named():
    assert parse_goodput(["ttft:500", "tpot:50.5"]) == {"ttft": 500.0, "tpot": 50.5}
    assert parse_goodput([]) == {}
    for pair in ("itl:5", "ttft", "ttft:", "ttft:x", "ttft:-1", "ttft:nan", "ttft:inf"):
        with pytest.raises(ValueError, match="goodput"):
            parse_goodput([pair])


def test_concurrency_is_counted_where_intervals_overlap():
    spans = [(0, 2), (1, 2), (2, 1), (2.5, 0.1), (9, 1)]
    assert max_concurrent([make_result(sent_s=start, e2e_s=length) for start, length in spans]) == 3
    assert max_concurrent([]) == 0


def test_samples_leave_failed_requests_out():
    found = samples([make_result(), make_result(error="x", ttft_s=9.0)])
    assert found["ttft"] == [0.1]
    assert len(found["itl"]) == 4
