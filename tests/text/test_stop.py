"""Stop strings against a naive search over the whole text, whatever the increments."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd.text.stop import StopChecker

TEXT = st.text("abc", max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text, stops, include, first_end=0):
    """What is shown of the whole text: the first end wins, then the order of the list."""
    for end in range(first_end + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def cut(text, cuts):
    bounds = sorted({0, len(text), *(at % (len(text) + 1) for at in cuts)})
    return [text[a:b] for a, b in pairwise(bounds)]


def run(checker, chunks):
    shown = []
    for chunk in chunks:
        text, stop = checker.feed(chunk)
        shown.append(text)
        if stop is not None:
            return "".join(shown), stop
    return "".join(shown) + checker.finish(), None


@settings(max_examples=1500, deadline=None)
@given(text=TEXT, stops=STOPS, include=st.booleans(), cuts=st.lists(st.integers(0, 40), max_size=12))
def test_equals_the_naive_search(text, stops, include, cuts):
    assert run(StopChecker(stops, include), cut(text, cuts)) == naive(text, stops, include)


@settings(max_examples=500, deadline=None)
@given(text=TEXT, stops=STOPS, include=st.booleans(), first=st.integers(0, 40))
def test_matches_that_end_before_min_tokens_do_not_count(text, stops, include, first):
    first = min(first, len(text))
    checker = StopChecker(stops, include)
    before = checker.feed(text[:first], can_match=False)
    assert before.stop is None
    shown, stop = run(checker, list(text[first:]))
    assert (before.text + shown, stop) == naive(text, stops, include, first)


@settings(max_examples=300, deadline=None)
@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=12))
def test_holds_back_only_what_may_become_a_stop_string(text, stops, cuts):
    checker, fed, shown = StopChecker(stops), "", ""
    for chunk in cut(text, cuts):
        fed += chunk
        out, stop = checker.feed(chunk)
        shown += out
        if stop is not None:
            return
        held = fed[len(shown) :]
        assert fed.startswith(shown)
        assert not held or any(stop.startswith(held) and held != stop for stop in stops)


def test_with_include_nothing_is_held_back():
    checker = StopChecker(["STOP"], include=True)
    assert checker.feed("a ST") == ("a ST", None)
    assert checker.feed("OP b") == ("OP", "STOP")


@pytest.mark.parametrize("stops", [["a" * 1023 + "b"] * 64, ["ab" * 511 + "a"] * 64])
def test_long_stop_strings_stay_cheap(stops):
    checker = StopChecker(stops)
    checker.feed("ab" * 500)
    start = time.process_time()
    for _ in range(200):
        checker.feed("ab"[:1])
    assert (time.process_time() - start) / 200 < 2e-3
