"""The line for systemctl status."""

from types import SimpleNamespace

from llmd.status import Rate, StatusLine


def test_rate_is_taken_over_whole_seconds():
    rate = Rate()
    assert rate.update(100, 10.0) == 0
    assert rate.update(500, 10.5) == 0  # too soon
    assert rate.update(300, 12.0) == 100
    assert rate.update(300, 12.5) == 100
    assert rate.update(300, 14.0) == 0


def service(**stats):
    return SimpleNamespace(engine=SimpleNamespace(stats=lambda: SimpleNamespace(num_output_tokens=7, **stats)))


def test_line_is_the_sum_of_all_models():
    line = StatusLine([service(num_running=30, num_waiting=5), service(num_running=4, num_waiting=0)])
    assert line.text() == "34 running, 5 waiting, 0 tok/s"
