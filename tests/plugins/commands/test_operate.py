"""`llmd status`, `top`, `explain`, `abort`, `drain` against a real daemon, and what they print."""

import json
import os
import pty
import subprocess
import sys
import threading
import time

import click
import pytest
from click.testing import CliRunner
from daemons import Daemon
from hypothesis import given
from hypothesis import strategies as st

from llmd.cli import main_command
from llmd_plugins.commands import operate
from llmd_plugins.commands.operate import logfile, view
from llmd_plugins.commands.operate.client import configured_socket, find_target
from llmd_plugins.commands.operate.command import screen

COMMANDS = {spec.name: spec.build() for spec in operate.llmd_register_commands()}


def start(folder, **environment):
    socket_path = str(folder / "admin.sock")
    return socket_path, Daemon("serve", "demo", cwd=folder, LLMD_SERVER__ADMIN_SOCKET=socket_path, **environment)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """(socket, daemon) of a daemon that takes 50 ms a step and logs JSON."""
    folder = tmp_path_factory.mktemp("daemon")
    socket_path, daemon = start(
        folder, FAKE_STEP_S="0.05", LLMD_LOG__FORMAT="json", LLMD_SERVER__ADMIN_KEYS='["adm"]'
    )  # fmt: skip
    with daemon:
        yield socket_path, daemon.ready()


def run(name, *arguments, code=0, **options):
    result = CliRunner().invoke(COMMANDS[name], [str(argument) for argument in arguments], **options)
    assert result.exit_code == code, result.output
    return result.output


class Slow(threading.Thread):
    """A request that takes seconds."""

    def __init__(self, daemon, request_id):
        super().__init__()
        self.answer = None
        self._daemon_process, self._request_id = daemon, request_id
        self.start()

    def run(self):
        body = {"prompt": "hello", "max_tokens": 120, "ignore_eos": True}
        self.answer = self._daemon_process.get("/v1/completions", body, **{"X-Request-Id": self._request_id})


def until(condition, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def is_decoding(socket_path, request_id):
    rows = json.loads(run("status", "--json", "--socket", socket_path))["requests"]
    return any(row["request_id"] == request_id and row["phase"] == "decode" for row in rows)


def test_status_over_socket_and_url(running):
    socket_path, daemon = running
    assert daemon.complete()[0] == 200
    text = run("status", "--socket", socket_path)
    assert "ready, up " in text
    assert "demo: ready, 0 running, 0 waiting" in text
    assert "(anonymous)" in text
    found = json.loads(run("status", "--json", "--url", daemon.url, env={"LLMD_ADMIN_KEY": "adm"}))
    assert found["models"][0]["names"] == ["demo"]
    assert found["pid"] == daemon.process.pid
    assert "key" in run("status", "--url", daemon.url, "--admin-key", "wrong", code=1)


def test_a_request_is_watched_explained_and_aborted(running):
    socket_path, daemon = running
    slow = Slow(daemon, "slow-1")
    until(lambda: is_decoding(socket_path, "slow-1"))
    picture = run("top", "--once", "--interval", "0.3", "--socket", socket_path)
    assert "slow-1" in picture
    assert "decode" in picture
    assert "output tok/s" in picture
    assert "slow-1: running, in decode" in run("explain", "cmpl-slow-1", "--socket", socket_path)
    assert run("abort", "slow-1", "--socket", socket_path) == "slow-1: 1 sequences ended\n"
    slow.join(10)
    assert slow.answer[0] == 503
    assert "operator" in slow.answer[1]["error"]["message"]
    text = run("explain", "slow-1", "--socket", socket_path)
    assert text.startswith("slow-1: POST /v1/completions 503, abort\n  error: the request was aborted by an operator\n")
    receipt = json.loads(run("explain", "slow-1", "--json", "--socket", socket_path))
    assert receipt["output_tokens"] > 0
    assert receipt["steps"] >= receipt["output_tokens"]
    assert {"queue_ms", "prefill_ms", "decode_ms", "ttft_ms", "preemptions", "cached_tokens"} <= set(receipt)
    assert "no request 'slow-1x' is known" in run("explain", "slow-1x", "--socket", socket_path, code=1)
    assert "is known" in run("abort", "slow-1", "--socket", socket_path, code=1)


def test_a_request_is_found_again_in_the_log(running, tmp_path):
    _, daemon = running
    assert daemon.get("/v1/completions", {"prompt": "hello", "max_tokens": 3}, **{"X-Request-Id": "logged-1"})[0] == 200
    daemon.wait_for('"request_id":"logged-1"')
    file = tmp_path / "llmd.log"
    file.write_text("not JSON\n" + daemon.log + "\n")
    assert "logged-1: POST /v1/completions 200, length" in run("explain", "cmpl-logged-1", "--log", file)
    assert json.loads(run("explain", "logged-1", "--log", file, "--json"))["receipt"]["output_tokens"] == 3
    assert "not in that file" in run("explain", "nobody", "--log", file, code=1)


def test_top_draws_on_a_terminal_until_it_is_interrupted(running):
    socket_path, _ = running
    master, slave = pty.openpty()
    arguments = [sys.executable, "-m", "llmd", "top", "--interval", "0.1", "--socket", socket_path]
    process = subprocess.Popen(arguments, stdout=slave, stderr=subprocess.PIPE)
    os.close(slave)
    seen = b""
    while seen.count(b"\x1b[H") < 2:
        seen += os.read(master, 4096)
    process.send_signal(2)
    while b"\x1b[?1049l" not in seen:
        seen += os.read(master, 4096)
    assert process.wait(10) in (0, 130)
    process.stderr.close()
    os.close(master)
    assert seen.startswith(b"\x1b[?1049h")
    assert b"llmd 0." in seen


def test_drain_waits_for_the_end(tmp_path):
    socket_path, daemon = start(tmp_path)
    with daemon:
        daemon.ready()
        assert run("drain", "--wait", "--socket", socket_path) == "draining\nended\n"
        assert daemon.process.wait(10) == 0


def test_nobody_there_is_told(tmp_path):
    text = run("status", "--socket", tmp_path / "none.sock", code=1)
    assert "no daemon answers at" in text
    assert "is it running" in text
    assert "--url must be like" in run("status", "--url", "localhost:8000", code=2)


def test_where_a_daemon_is_looked_for():
    assert str(find_target(None, None, None, {})) == "/run/llmd/admin.sock"
    assert str(find_target(None, None, None, {"RUNTIME_DIRECTORY": "/run/two:/run/three"})) == "/run/two/admin.sock"
    assert str(find_target(None, None, None, {"LLMD_SERVER__ADMIN_SOCKET": "/tmp/x"})) == "/tmp/x"
    assert str(find_target("/tmp/y", None, None, {"LLMD_SERVER__ADMIN_SOCKET": "/tmp/x"})) == "/tmp/y"
    assert find_target("/tmp/y", "http://h:1/", "k", {}) == ("", "http://h:1", "k")


def test_the_configuration_names_the_socket(running, tmp_path):
    socket_path, _ = running
    file = tmp_path / "llmd.toml"
    file.write_text(f'[server]\nadmin_socket = "{socket_path}"\n')
    result = CliRunner().invoke(main_command, ["--config", str(file), "status"])
    assert "ready, up " in result.output
    assert configured_socket(None) is None
    file.write_text("server = 3")
    with pytest.raises(click.UsageError, match="--config"):
        configured_socket(str(file))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (59.94, "59.9s"), (187, "3m07s"), (5 * 3600 + 720, "5h12m"), (3 * 86400 + 4 * 3600, "3d04h")],
)
def test_durations(seconds, text):
    assert view.duration(seconds) == text


@given(st.floats(-1, 2), st.integers(1, 40))
def test_bars_are_as_wide_as_asked(share, width):
    assert view.bar(share, width).index("]") == width + 1


@given(st.lists(st.tuples(st.text(max_size=60), st.integers(0, 10**6)), min_size=1, max_size=5))
def test_tables_show_no_control_characters_and_line_up(rows):
    lines = view.table([("NAME", "NUMBER"), *rows])
    assert len(lines) == len(rows) + 1
    assert all(line.isprintable() for line in lines)
    assert len({len(line) for line in lines}) == 1


STATS = {
    "num_running": 2, "num_waiting": 1, "num_waiting_tokens": 30, "num_preemptions": 0, "kv_usage": 0.5,
    "prefix_hits": 1, "prefix_queries": 4, "num_prompt_tokens": 100, "num_output_tokens": 50, "num_steps": 10,
}  # fmt: skip


ADAPTER = {
    "adapter": "sql", "model": "m", "running": 1, "requests": 1, "prompt_tokens": 2, "cached_tokens": 0, "output_tokens": 3,
}  # fmt: skip


STANDING = {
    "name": "sql", "state": "loaded", "slot": None, "rank": 8, "num_bytes": 1000, "num_running": 0, "num_waiting": 2,
    "num_requests": 3, "num_loads": 1, "num_slot_loads": 2, "num_evictions": 2, "wait_s": 4.2,
}  # fmt: skip


def status_of(**changes):
    model = {"names": ["m"], "state": "ready", "progress": {"phase": "ready", "fraction": 1.0}, "stats": STATS}
    model["adapters"] = [STANDING]
    values = {
        "version": "1", "state": "ready", "uptime_s": 5.0, "pid": 7, "num_requests": 0, "models": [model], "requests": [],
        "keys": [], "adapters": [ADAPTER],
    }  # fmt: skip
    return values | changes


def test_rates_are_differences():
    later = STATS | {"num_prompt_tokens": 300, "num_output_tokens": 150, "num_steps": 30}
    assert view.rates(later, STATS, 2.0) == (100.0, 50.0, 10.0)
    assert view.rates(STATS, later, 2.0) == (0.0, 0.0, 0.0)  # it was started again
    assert view.rates(STATS, None, 2.0) == (0.0, 0.0, 0.0)


def test_top_without_requests_and_while_loading():
    lines = view.top_lines(status_of(), status_of(), 1.0)
    assert "no requests" in lines
    assert any(line.startswith("sql") for line in lines)
    loading = {"names": ["m"], "state": "loading", "progress": {"phase": "shard 3/8", "fraction": 0.375}, "stats": None}
    loading["adapters"] = []
    assert "m: loading, shard 3/8 (38 %)" in view.top_lines(status_of(models=[loading]), None, 1.0)


def test_the_share_of_the_memory_bandwidth_is_shown_where_it_is_known():
    model = {"names": ["m"], "state": "ready", "adapters": []}
    lines = view.model_lines(model | {"stats": STATS | {"memory_utilization": 0.75}})
    assert "  memory bandwidth [###############.....]  75.0 % of the last decode steps" in lines
    assert view.model_lines(model | {"stats": STATS | {"memory_utilization": None}}) == view.model_lines(
        model | {"stats": STATS}
    )


def test_where_memory_goes_is_shown_as_it_was_told():
    rows = [
        {"name": "weights", "value": 3 << 29, "is_bytes": True, "note": ""},
        {"name": "graphs", "value": 5 << 20, "is_bytes": True, "note": "estimated"},
        {"name": "adapters", "value": 2048, "is_bytes": True, "note": ""},
        {"name": "tokens", "value": 1234567, "is_bytes": False, "note": "of a context"},
    ]
    shown = [line.split() for line in view.memory_lines(rows)]
    assert shown == [
        ["weights", "1.50", "GiB"], ["graphs", "5.0", "MiB", "estimated"], ["adapters", "2", "KiB"],
        ["tokens", "1,234,567", "of", "a", "context"],
    ]  # fmt: skip
    model = status_of()["models"][0]
    lines = view.status_lines(status_of(models=[model | {"memory": rows}]))
    assert "  weights           1.50 GiB" in lines


def test_adapters_that_are_wanted_are_shown_first():
    busy = STANDING | {"name": "busy", "slot": 0, "num_running": 3}
    model = {
        "names": ["m"],
        "adapters": [STANDING, busy, *(STANDING | {"name": f"x{n}", "num_waiting": 0} for n in range(20))],
    }
    _, titles, first, second, *_, last = view.adapter_lines([model])
    assert titles.split()[:4] == ["ADAPTER", "MODEL", "STATE", "SLOT"]
    assert first.split() == ["busy", "m", "loaded", "0", "8", "3", "2", "1", "2", "4.2s"]
    assert second.split()[:4] == ["sql", "m", "loaded", "-"]
    assert last == "and 12 more"
    assert view.adapter_lines([model | {"adapters": []}]) == []


def test_a_picture_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "5")
    drawn = screen(["x" * 100] * 50)
    assert drawn.count("\n") == 4
    assert max(map(len, drawn.replace("\x1b[K", "").split("\n"))) <= 20 + len("\x1b[H")


def test_a_log_is_searched_by_either_id():
    lines = [
        '{"request_id": "r", "logger": "llmd.server", "message": "a"}',
        '{"request_id": "r", "logger": "llmd.access", "message": "b"}',
        '{"request_id": "other", "logger": "llmd.access", "message": "c"}',
        "[]", "nonsense", '{"request_id": ""}',
    ]  # fmt: skip
    for name in ("r", "chatcmpl-r", "msg_r-7f"):
        found = logfile.search(lines, name)
        assert found.receipt["message"] == "b"
        assert [entry["message"] for entry in found.lines] == ["a"]
    assert logfile.search(lines, "x") == (None, [])
