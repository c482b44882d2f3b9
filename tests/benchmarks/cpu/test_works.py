"""What is asked of the engines, and the figures that come of it."""

import pytest

from benchmarks.cpu.works import SERVED, describe


@pytest.mark.parametrize("work", SERVED.values(), ids=lambda work: work.name)
def test_prompts_are_the_same_for_a_seed_and_new_for_another(work):
    orders = work.orders("1", 1000)
    assert orders == work.orders("1", 1000)
    others = [*work.orders("2", 1000), work.warm_up("1", 1000)]
    prompts = [tuple(prompt) for order in (*orders, *others) for prompt in order.prompts]
    assert len(set(prompts)) == len(prompts)
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)


def test_the_works_have_their_sizes():
    sizes = {
        name: [(len(order.prompts), order.num_tokens) for order in work.orders("1", 9)] for name, work in SERVED.items()
    }
    assert sizes["decode"] == [(1, 1), (1, 1), (1, 128)]
    assert sizes["many64"] == [(64, 64)]
    assert {len(prompt) for prompt in SERVED["prefill"].orders("1", 9)[0].prompts} == {1024}
    lengths = [len(prompt) for prompt in SERVED["many64"].orders("1", 9)[0].prompts]
    assert 64 <= min(lengths) < 90 < 160 < max(lengths) <= 192
    assert SERVED["many16"].max_len == 256


@pytest.mark.parametrize(
    ("name", "seconds", "figure"),
    [
        ("decode", [0.6, 0.5, 3.04], 127 / 2.54),
        ("prefill", [4.0, 2.0], 512.0),
        ("many16", [8.0], 128.0),
        ("many64", [16.0], 256.0),
    ],
)
def test_figures(name, seconds, figure):
    work = SERVED[name]
    assert work.figure(work.orders("1", 9), seconds) == pytest.approx(figure)


def test_the_result_tells_what_was_done():
    assert set(describe(["start", "decode"])) == {"start", "decode", "memory"}
