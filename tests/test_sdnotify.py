"""What is sent to systemd, and that a socket that is gone stops nothing."""

import os
import socket
import time

import pytest
from daemons import NotifySocket

from llmd.sdnotify import Notifier


@pytest.fixture(params=["path", "abstract"])
def systemd(request, tmp_path):
    """A listening socket and its address."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@llmd-test-{os.getpid()}"
    made = NotifySocket(address)
    made.address = address
    yield made
    made.close()


def test_messages(systemd):
    notifier = Notifier(systemd.address)
    notifier.status("loading")
    notifier.status("loading")
    notifier.extend_timeout(1.5)
    notifier.ready("0 running")
    notifier.watchdog()
    notifier.stopping("draining")
    notifier.failed("failed: no memory")
    notifier.close()
    assert systemd.listen() == [
        {"STATUS": "loading"},
        {"EXTEND_TIMEOUT_USEC": "1500000"},
        {"READY": "1", "STATUS": "0 running"},
        {"WATCHDOG": "1"},
        {"STOPPING": "1", "STATUS": "draining"},
        {"STATUS": "failed: no memory"},
    ]


def test_reload_tells_when_it_began(systemd):
    """systemd compares the time with that of its signal, both on the monotonic clock."""
    notifier = Notifier(systemd.address)
    before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    notifier.ready("1 running")
    notifier.close()
    began, ended = systemd.listen()
    assert before_us <= int(began.pop("MONOTONIC_USEC")) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert began == {"RELOADING": "1", "STATUS": "reloading the configuration"}
    assert ended == {"READY": "1", "STATUS": "1 running"}


def test_status_is_told_at_most_once_a_second(systemd, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr("llmd.sdnotify.time.monotonic", lambda: now_s[0])
    notifier = Notifier(systemd.address)
    for step in range(21):
        notifier.status(f"{step} running")
        now_s[0] += 0.25
    notifier.close()
    monkeypatch.undo()
    assert systemd.listen() == [{"STATUS": f"{step} running"} for step in range(0, 21, 4)]


def test_supervisor_that_does_not_read_stops_nothing(tmp_path, caplog):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as full:
        full.bind(address)
        notifier = Notifier(address)
        for _ in range(2000):
            notifier.watchdog()
        notifier.close()
    assert caplog.text.count("systemd cannot be told anything") == 1


def test_without_a_socket_nothing_happens(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier()
    notifier.ready("ready")
    assert notifier.watchdog_s is None
    notifier.close()


def test_socket_that_is_gone_is_told_once(tmp_path, caplog):
    notifier = Notifier(str(tmp_path / "none"))
    notifier.watchdog()
    notifier.watchdog()
    notifier.close()
    assert caplog.text.count("systemd cannot be told anything") == 1


@pytest.mark.parametrize(
    ("interval", "pid", "expected"),
    [
        ("30000000", "", 30.0),
        pytest.param("30000000", str(os.getpid()), 30.0, id="its own"),
        ("30000000", "1", None),
        ("x", "", None),
        ("0", "", None),
    ],
)
def test_watchdog_is_for_the_process_that_it_names(monkeypatch, tmp_path, interval, pid, expected):
    monkeypatch.setenv("WATCHDOG_USEC", interval)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    notifier = Notifier(str(tmp_path / "none"))
    assert notifier.watchdog_s == expected
    notifier.close()
