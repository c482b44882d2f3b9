"""The daemon as a real process: start, signals, reload, drain, exit codes, what systemd hears."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from daemons import ROOT, Daemon, NotifySocket


@pytest.fixture
def daemon(tmp_path):
    """Start daemons in a folder of their own; they end with the test."""
    running = []

    def start(*arguments, **options):
        running.append(Daemon(*(arguments or ("serve", "demo")), cwd=tmp_path, **options))
        return running[-1]

    yield start
    for made in running:
        made.__exit__()


def write(tmp_path, text):
    (tmp_path / "llmd.toml").write_text(text)


# --- start


def test_demo_model_from_the_committed_file(daemon):
    """The whole road: etc/llmd.toml, the real executor, a request, a clean end."""
    running = daemon("--config", str(ROOT / "etc" / "llmd.toml"), fake=False, LLMD_CACHE__KV_CACHE_BYTES="16M").ready()
    status, answer = running.complete()
    assert (status, answer["model"], answer["usage"]["completion_tokens"]) == (200, "demo", 4)
    assert running.get("/ready")[0] == 200
    assert running.stop() == 0
    for line in (
        r"llmd 0\.\S+ listens on http://127\.0\.0\.1:\d+",
        r"demo: \S+, attention \S+, \d+ KV blocks",
        "llmd ends: clean",
    ):
        running.wait_for(line)


def test_http_answers_while_the_model_loads(daemon):
    running = daemon(FAKE_LOAD_S="1")
    assert running.url
    seen = set()
    while "ready after" not in running.log and len(seen) < 1000:
        status, answer = running.get("/ready")
        seen.add((status, answer.get("phase")))
        if status == 200:
            break
        assert running.get("/health")[0] == 200
        assert running.complete()[0] in (503, 200)  # 200: it became ready just now
    assert (503, "shard 1/2") in seen
    running.ready()
    assert running.complete()[0] == 200


def test_signal_while_loading_ends_at_once(daemon):
    running = daemon(FAKE_LOAD_S="60")
    running.wait_for("listens on")
    start_s = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - start_s < 5


def test_serve_as_a_function(daemon):
    program = "import llmd, sys; sys.exit(llmd.serve(model='demo', host='127.0.0.1', max_num_seqs=4))"
    running = daemon(program=program).ready()
    assert running.complete()[0] == 200
    assert running.stop() == 0


def test_serve_as_a_function_raises_what_is_wrong(tmp_path):
    program = "import llmd, sys; sys.exit(llmd.serve(model='nowhere/at-all/is this', port=0))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert "ModelError: model 'nowhere/at-all/is this' does not exist" in run.stderr
    program = "import llmd; llmd.serve(prot=0)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert "ConfigError: unknown setting prot; did you mean port?" in run.stderr


# --- exit codes


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[server]\nport = 'x'\n", "llmd: llmd.toml:2: server.port: 'x' is not valid; allowed: an integer"),
        ("[[models]]\nmodel = './nowhere'\n", "llmd: model './nowhere' does not exist"),
        ("[plugins]\nrequire = ['acme']\n", "llmd: plugins.require: no plugin is named 'acme'"),
        ("[server]\nhost = '203.0.113.7'\n", "llmd: llmd.toml:2: server.host: cannot listen on '203.0.113.7'"),
    ],
)
def test_configuration_that_cannot_be_used_exits_78(daemon, tmp_path, text, line):
    write(tmp_path, text)
    running = daemon("--config", "llmd.toml", fake=False, LLMD_SERVER__PORT=None if "port" in text else "0")
    assert running.process.wait(60) == 78
    running._reader.join(5)
    assert line in running.log


def test_port_that_is_taken_exits_75(daemon):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        running = daemon(LLMD_SERVER__PORT=str(taken.getsockname()[1]))
        assert running.process.wait(60) == 75
    running._reader.join(5)
    assert "server.port: cannot listen on" in running.log


def test_device_that_is_lost_exits_69(daemon):
    running = daemon(FAKE_BREAKS="1").ready()
    status, answer = running.complete()
    assert status >= 500
    assert answer["error"]["message"]
    assert running.process.wait(60) == 69
    running._reader.join(5)
    assert "the engine failed: the fake device is lost" in running.log


# --- plugins that break while the server is built and while it serves

BREAKS_LATE = """
from llmd.api.v1 import MetricsSpec, MiddlewareSpec, RouteSpec, ServiceSpec, hookimpl

def build(*given):
    raise RuntimeError("ouch")

def good(context):
    from aiohttp import web

    async def answer(request):
        return web.json_response({"zeta": 1})

    return answer

@hookimpl
def llmd_register_routes():
    return [
        RouteSpec(name="bad", summary="for tests", method="GET", path="/bad", build=build),
        RouteSpec(name="good", summary="for tests", method="GET", path="/good", build=good),
    ]

@hookimpl
def llmd_register_middlewares():
    return [MiddlewareSpec(name="bad", summary="for tests", build=build)]

@hookimpl
def llmd_register_metrics():
    return [MetricsSpec(name="bad", summary="for tests", build=build)]

@hookimpl
def llmd_register_services():
    return [ServiceSpec(name="bad", summary="for tests", build=build)]

@hookimpl
def llmd_request_finished(summary):
    raise RuntimeError("ouch")
"""
BAD_DOOR = """
from llmd.api.v1 import AuthenticatorSpec, hookimpl

def build(config):
    raise RuntimeError("ouch")

@hookimpl
def llmd_register_authenticators():
    return [AuthenticatorSpec(name="door", summary="for tests", build=build)]
"""


def test_wheel_that_breaks_late_loses_only_what_broke(daemon):
    running = daemon(wheel=BREAKS_LATE).ready()
    for _ in range(2):
        assert running.complete()[0] == 200
    assert running.get("/good") == (200, {"zeta": 1})
    assert running.get("/bad")[0] == 404
    assert running.get("/metrics")[0] == 200
    assert running.stop() == 0
    for family in ("routes", "middlewares", "metrics", "services"):
        line = f"plugin acme-more.main of acme-more: {family}.bad cannot be built and is left out: RuntimeError: ouch"
        assert running.log.count(line) == 1
    assert running.log.count("llmd_request_finished raised RuntimeError: ouch") == 1


def test_authenticator_that_cannot_be_built_stops_the_start(daemon):
    running = daemon(wheel=BAD_DOOR)
    assert running.process.wait(60) == 78
    running._reader.join(5)
    assert "authenticator 'door' cannot be built: RuntimeError: ouch" in running.log


# --- drain


def stream(running, seen, **fields):
    """Read a stream in a thread; its lines, or the error that ended it, are put into `seen`."""

    def read():
        body = json.dumps({"prompt": "hello", "max_tokens": 60, "stream": True, "ignore_eos": True, **fields}).encode()
        request = urllib.request.Request(running.url + "/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                seen.extend(line.decode().strip() for line in answer)
        except OSError as error:
            seen.append(repr(error))

    thread = threading.Thread(target=read)
    thread.start()
    deadline = time.monotonic() + 10
    while running.get("/metrics")[1].count("llmd_") == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    return thread


def test_running_requests_end_before_the_daemon(daemon, tmp_path):
    running = daemon(FAKE_STEP_S="0.03", LLMD_SERVER__ADMIN_SOCKET=str(tmp_path / "admin.sock")).ready()
    seen = []
    thread = stream(running, seen)
    running.signal(signal.SIGTERM)
    running.wait_for("SIGTERM: draining")
    assert running.admin("/ready")[0] == 503
    assert running.admin("/admin/status")[1]["state"] == "draining"
    with pytest.raises(urllib.error.URLError, match="refused"):  # the listener was handed back
        running.complete()
    assert running.process.wait(60) == 0
    thread.join(10)
    assert seen[-2] == "data: [DONE]"
    assert any('"finish_reason":"length"' in line for line in seen)


def test_second_signal_aborts_what_runs(daemon):
    running = daemon(FAKE_STEP_S="0.5").ready()
    seen = []
    thread = stream(running, seen)
    running.signal(signal.SIGINT)
    running.wait_for("SIGINT: draining")
    start_s = time.monotonic()
    assert running.stop(signal.SIGTERM) == 0
    assert time.monotonic() - start_s < 8
    thread.join(10)
    assert not any('"finish_reason":"length"' in line for line in seen)


def test_drain_has_a_bound(daemon):
    running = daemon(FAKE_STEP_S="0.5", LLMD_SERVER__DRAIN_TIMEOUT_S="0.5").ready()
    seen = []
    thread = stream(running, seen)
    start_s = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - start_s < 8
    thread.join(10)


# --- reload


def test_reload_applies_what_is_live_and_names_the_rest(daemon, tmp_path):
    write(tmp_path, "[server]\napi_keys = ['one']\n[log]\nlevel = 'info'\n")
    running = daemon("--config", "llmd.toml").ready()
    assert running.complete()[0] == 401
    assert running.get("/v1/models", Authorization="Bearer one")[0] == 200
    write(tmp_path, "[server]\napi_keys = ['two']\nroot_path = '/new'\n[log]\nlevel = 'debug'\n")
    running.signal(signal.SIGHUP)
    running.wait_for("reloaded: 3 keys changed")
    for line in ("server.api_keys: applied", "log.level: applied", "server.root_path: needs a restart"):
        assert f"reload: {line}" in running.log
    assert running.get("/v1/models", Authorization="Bearer one")[0] == 401
    assert running.get("/v1/models", Authorization="Bearer two")[0] == 200
    assert running.stop() == 0


BAD_FILES = {
    "[server\n": "llmd.toml:1: Expected ']'",
    "[server]\napi_keys = ['two']\nprot = 1\n": "llmd.toml:3: unknown key server.prot; did you mean port?",
    "[server]\napi_keys = ['two']\nssl_certfile = 'c'\nssl_keyfile = 'k'\n": "server.ssl_certfile: 'c' is not a file",
    "[server]\n": "server.api_keys: the last key cannot be taken away while serving",
}


def test_bad_file_changes_nothing(daemon, tmp_path):
    write(tmp_path, "[server]\napi_keys = ['one']\n")
    running = daemon("--config", "llmd.toml").ready()
    for text, problem in BAD_FILES.items():
        write(tmp_path, text)
        num_lines = len(running.lines)
        running.signal(signal.SIGHUP)
        running.wait_for(f"reload refused: .*{re.escape(problem)}", after=num_lines)
        assert running.get("/v1/models", Authorization="Bearer one")[0] == 200
        assert running.get("/v1/models", Authorization="Bearer two")[0] == 401
    assert running.stop() == 0


# --- systemd


def test_what_systemd_hears(daemon):
    address = f"@llmd-test-{time.monotonic_ns()}"  # abstract; the next test has one with a path
    systemd = NotifySocket(address)
    running = daemon(NOTIFY_SOCKET=address, WATCHDOG_USEC="600000", FAKE_LOAD_S="1.5").ready()
    systemd.listen(1.5)
    assert running.stop() == 0
    heard = systemd.listen()
    systemd.close()
    names = [name for message in heard for name in message]
    assert {"STATUS": "loading: shard 1/2"} in heard
    assert names.index("EXTEND_TIMEOUT_USEC") < names.index("READY") < names.index("WATCHDOG") < names.index("STOPPING")
    assert names.count("READY") == 1
    assert names.count("WATCHDOG") >= 2


def test_watchdog_hears_nothing_from_a_device_that_hangs(daemon, tmp_path):
    """Nothing runs and the executor does not answer: systemd hears nothing, and soon the process ends by itself."""
    address = str(tmp_path / "notify")
    systemd = NotifySocket(address)
    running = daemon(
        NOTIFY_SOCKET=address, WATCHDOG_USEC="600000", FAKE_PING_S="60", LLMD_HEALTH__HANG_TIMEOUT_S="1.5"
    ).ready()
    running.wait_for("the idle executor gave no answer")
    assert sum("WATCHDOG" in message for message in systemd.listen()) <= 1  # for the warm-up's steps
    systemd.close()
    assert running.process.wait(30) == 70


# --- other listeners


def test_unix_socket(daemon, tmp_path):
    running = daemon(LLMD_SERVER__UDS=str(tmp_path / "llmd.sock")).ready()
    assert running.url == f"unix:{tmp_path}/llmd.sock"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "llmd.sock"))
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.recv(64).startswith(b"HTTP/1.1 200")
    assert running.stop() == 0


def test_json_log(daemon):
    running = daemon(LLMD_LOG__FORMAT="json").ready()
    running.complete()
    assert running.stop() == 0
    running._reader.join(5)
    entries = [json.loads(line) for line in running.lines]
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in entries)
