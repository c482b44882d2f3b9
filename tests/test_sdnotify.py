"""What is sent to systemd, and that a socket that is gone stops nothing."""

import os

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
    notifier.close()
    assert systemd.listen() == [
        {"STATUS": "loading"},
        {"EXTEND_TIMEOUT_USEC": "1500000"},
        {"READY": "1", "STATUS": "0 running"},
        {"WATCHDOG": "1"},
        {"STOPPING": "1", "STATUS": "draining"},
    ]


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
        ("30000000", str(os.getpid()), 30.0),
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
