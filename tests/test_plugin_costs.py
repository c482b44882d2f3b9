"""`llmd plugins --timing --url`: what a running daemon says its wheels cost in steps."""

from __future__ import annotations

import json
import socketserver
import threading
from http.server import BaseHTTPRequestHandler

import pytest
from click.testing import CliRunner

from llmd.cli import main_command
from llmd.errors import ConfigError
from llmd.plugin_costs import ask_daemon, step_table

COSTS = {
    "samplers.slow": {"calls": 200, "seconds": 3.0, "failures": 0, "is_slow": True},
    "logits_processors.weak": {"calls": 10, "seconds": 0.002, "failures": 1, "is_slow": False},
}
ROWS = [{"name": "acme.main", "steps": COSTS}, {"name": "samplers.torch", "steps": {}}]


class Daemon(BaseHTTPRequestHandler):
    """Answers whoever knows the key."""

    content = json.dumps({"plugins": ROWS})

    def do_GET(self):
        known = self.path == "/admin/plugins" and self.headers.get("Authorization") in (None, "Bearer k")
        self.send_response(200 if known else 403)
        self.end_headers()
        self.wfile.write(self.content.encode())

    def address_string(self):
        return "local"

    def log_message(self, *args):
        """Nobody reads it."""


@pytest.fixture(params=["http", "unix"])
def url(request, tmp_path):
    if request.param == "http":
        server = socketserver.TCPServer(("127.0.0.1", 0), Daemon)
        where = f"http://127.0.0.1:{server.server_address[1]}"
    else:
        server = socketserver.UnixStreamServer(str(tmp_path / "s"), Daemon)
        where = f"unix:{tmp_path / 's'}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield where
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_dearest_comes_first(url):
    assert list(step_table(ask_daemon(url))) == [
        ("samplers.slow", "acme.main", "200", "15000 us", "3.00 s", "slow"),
        ("logits_processors.weak", "acme.main", "10", "200 us", "0.00 s", "1 failed"),
    ]
    shown = CliRunner().invoke(main_command, ["plugins", "--timing", "--url", url]).stdout
    assert "samplers.slow           acme.main  200    15000 us  3.00 s    slow" in shown
    with pytest.raises(ConfigError, match="answers with status 403"):
        ask_daemon(url, "another")


def test_no_wheel_in_steps(url, monkeypatch):
    monkeypatch.setattr(Daemon, "content", json.dumps({"plugins": ROWS[1:]}))
    shown = CliRunner().invoke(main_command, ["plugins", "--timing", "--url", url]).stdout
    assert shown.endswith("no wheel takes part in this daemon's steps\n")


@pytest.mark.parametrize("content", ["x", "[]", "{}", "null"])
def test_something_else_answers(url, content, monkeypatch):
    monkeypatch.setattr(Daemon, "content", content)
    with pytest.raises(ConfigError, match="is no list of plugins"):
        ask_daemon(url)


@pytest.mark.parametrize("where", ["127.0.0.1:80", "ftp://x", "http://x:99999", "unix:/nowhere/s", "http://127.0.0.1:1"])
def test_nobody_answers(where):
    with pytest.raises(ConfigError, match="--url"):
        ask_daemon(where)
