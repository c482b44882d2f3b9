"""Rates to the token, with a clock that stands still until it is moved."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd.config import KeyConfig
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.queue import Share
from llmd.errors import InvalidParams, InvalidRequest, ModelNotFound, Overloaded
from llmd.server.buckets import TokenBucket
from llmd.server.quotas import Quotas

SECOND = 10**9


class Clock:
    """Nanoseconds by hand."""

    def __init__(self) -> None:
        self.now_ns = 5 * SECOND

    def __call__(self) -> int:
        return self.now_ns

    def pass_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * SECOND)


def quotas_of(clock=None, **limits) -> Quotas:
    return Quotas([KeyConfig(name="k", key="secret", **limits)], clock or Clock())


def ended(num_output_tokens: int):
    return SimpleNamespace(num_output_tokens=num_output_tokens)


# --- the bucket


def test_a_bucket_begins_full_and_is_refilled_to_the_token():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    for _ in range(60):
        assert bucket.wait_s(1) == 0
        bucket.take(1)
    assert bucket.available == 0
    assert bucket.wait_s(1) == 1.0
    clock.pass_s(0.999999999)
    assert bucket.wait_s(1) == 1e-9
    clock.now_ns += 1
    assert bucket.wait_s(1) == 0
    clock.pass_s(3600)
    assert bucket.available == 60


def test_a_debt_is_paid_back():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.take(90)
    assert bucket.available == -30
    assert bucket.wait_s(10) == 40.0
    assert bucket.wait_s(10_000) == 90.0  # as much as it can ever hold


def test_what_is_given_back_is_there_again_and_never_more_than_full():
    bucket = TokenBucket(100, Clock())
    bucket.take(80)
    bucket.give_back(30)
    assert bucket.available == 50
    bucket.give_back(1000)
    assert bucket.available == 100


def test_a_clock_that_steps_back_changes_nothing():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.take(60)
    clock.pass_s(-3)
    assert bucket.available == 0
    clock.pass_s(4)
    assert bucket.available == 1


def test_another_rate_keeps_what_was_spent():
    bucket = TokenBucket(100, Clock())
    bucket.take(40)
    bucket.set_rate(50)
    assert bucket.available == 10
    bucket.set_rate(1000)
    assert bucket.available == 960


@given(
    st.integers(1, 10**6),
    st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 30, allow_nan=False)), min_size=1, max_size=40),
)
def test_never_more_than_the_rate_over_any_time(rate, steps):
    clock = Clock()
    bucket, taken, began_ns = TokenBucket(rate, clock), 0, clock.now_ns
    for amount, seconds in steps:
        wanted = min(amount, rate)
        clock.now_ns += round(bucket.wait_s(wanted) * SECOND)  # exactly the time that was told
        assert bucket.wait_s(wanted) <= 1e-6
        bucket.take(wanted)
        taken += wanted
        clock.pass_s(seconds)
        assert taken <= rate + rate * (clock.now_ns - began_ns + 1000) / (60 * SECOND)


# --- requests


def test_requests_a_minute():
    clock = Clock()
    quotas = quotas_of(clock, requests_per_minute=2)
    for remaining in ("1", "0"):
        with quotas.enter("k") as headers:
            assert headers["x-ratelimit-remaining-requests"] == remaining
            assert headers["x-ratelimit-limit-requests"] == "2"
    with pytest.raises(Overloaded, match="2 requests a minute") as refused, quotas.enter("k"):
        pass
    assert refused.value.retry_after_s == 30.0
    clock.pass_s(30)
    with quotas.enter("k"):
        pass


def test_requests_at_once_are_counted_until_they_end():
    quotas = quotas_of(max_concurrent=1)
    with quotas.enter("k"), pytest.raises(Overloaded, match="as many as it may"), quotas.enter("k"):
        pass
    with pytest.raises(RuntimeError), quotas.enter("k"):
        raise RuntimeError
    with quotas.enter("k"):
        pass


def test_a_refused_request_costs_nothing():
    quotas = quotas_of(max_concurrent=1, requests_per_minute=2)
    with quotas.enter("k"), pytest.raises(Overloaded), quotas.enter("k"):
        pass
    with quotas.enter("k"):
        pass


def test_other_keys_have_no_limits():
    quotas = quotas_of(requests_per_minute=1, max_concurrent=1, models=("a",), tokens_per_minute=1, max_context=1)
    for _ in range(5):
        with quotas.enter("other") as headers:
            assert headers == {}
    quotas.check("other", ("b",))
    quotas.check_tokens("other", SamplingParams(max_tokens=9), 9)
    assert quotas.reserve("other", SamplingParams(), 9) is None
    assert quotas.fit("other", SamplingParams(max_tokens=9), 9).max_tokens == 9


# --- tokens


def test_tokens_are_reserved_and_what_is_not_generated_is_given_back():
    quotas = quotas_of(tokens_per_minute=100)
    params = SamplingParams(max_tokens=40, n=2)
    quotas.check_tokens("k", params, 20)
    settle = quotas.reserve("k", params, 20)
    with pytest.raises(Overloaded, match="100 tokens a minute, this request up to 30") as refused:
        quotas.check_tokens("k", SamplingParams(max_tokens=10), 20)
    assert refused.value.retry_after_s == 18.0
    settle(ended(num_output_tokens=30))
    quotas.check_tokens("k", SamplingParams(max_tokens=10), 40)
    with pytest.raises(Overloaded):
        quotas.check_tokens("k", SamplingParams(max_tokens=11), 40)


def test_a_request_larger_than_a_minute_leaves_a_debt():
    clock = Clock()
    quotas = quotas_of(clock, tokens_per_minute=60)
    params = SamplingParams(max_tokens=1000)
    quotas.check_tokens("k", params, 10)
    quotas.reserve("k", params, 10)(ended(num_output_tokens=80))
    with pytest.raises(Overloaded) as refused:
        quotas.check_tokens("k", PoolingParams(), 1)
    assert refused.value.retry_after_s == 31.0


# --- sizes and models


def test_sizes_are_lowered_where_nobody_asked_and_refused_where_somebody_did():
    quotas = quotas_of(max_tokens=50, max_context=100)
    assert quotas.fit("k", SamplingParams(max_tokens=20), 10).max_tokens == 20
    assert quotas.fit("k", SamplingParams(max_tokens=None), 10).max_tokens == 50
    assert quotas.fit("k", SamplingParams(max_tokens=400, min_tokens=60), 80, is_asked=False).max_tokens == 20
    with pytest.raises(InvalidParams, match="at most 20 with this key and prompt"):
        quotas.fit("k", SamplingParams(max_tokens=21), 80)
    with pytest.raises(InvalidRequest, match="at least 101 tokens and this key may use 100"):
        quotas.fit("k", SamplingParams(max_tokens=1), 100)
    with pytest.raises(InvalidRequest):
        quotas.fit_prompt("k", 101)
    quotas.fit_prompt("k", 100)


def test_models_and_adapters():
    quotas = quotas_of(models=("a",), adapters=("x",))
    quotas.check("k", ("base", "a"))
    quotas.check("k", ("a",), "x")
    for names, adapter in ((("b",), None), (("a",), "y")):
        with pytest.raises(ModelNotFound):
            quotas.check("k", names, adapter)


# --- changes while serving


def test_a_reload_keeps_what_was_used():
    clock = Clock()
    quotas = quotas_of(clock, requests_per_minute=2, tokens_per_minute=10, max_concurrent=1)
    settle = quotas.reserve("k", SamplingParams(max_tokens=5), 5)
    with quotas.enter("k"):
        quotas.configure([KeyConfig(name="k", key="new", requests_per_minute=1, weight=3.0, priority=-1, max_concurrent=1)])
        with pytest.raises(Overloaded), quotas.enter("k"):
            pass
    with pytest.raises(Overloaded, match="1 requests"), quotas.enter("k"):
        pass
    settle(ended(0))  # the limit is gone meanwhile
    assert quotas.shares() == {"k": Share(3.0, -1)}
    quotas.configure([])
    with quotas.enter("k"):
        pass
