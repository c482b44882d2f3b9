"""What goes wrong around a daemon, each with a real process: it is survived, and other requests are unharmed."""

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
from daemons import Daemon, NotifySocket, unix_request

SLOW = {"FAKE_STEP_S": "0.02"}


@pytest.fixture
def daemon(tmp_path):
    """Start daemons with an admin socket; they end with the test."""
    running = []

    def start(*arguments, **options):
        options.setdefault("LLMD_SERVER__ADMIN_SOCKET", str(tmp_path / "admin.sock"))
        running.append(Daemon(*(arguments or ("serve", "demo")), cwd=tmp_path, **options))
        return running[-1]

    yield start
    for made in running:
        made.__exit__()


def port_of(running):
    return int(running.url.rpartition(":")[2])


def request_bytes(**fields):
    body = json.dumps({"prompt": "hello", "max_tokens": 100, "stream": True, "ignore_eos": True, **fields}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n"
    )
    return head.encode() + body


class Witness:
    """Another client's stream, which must go on as if nothing happened."""

    def __init__(self, running, num_tokens=100):
        self.num_tokens = num_tokens
        self.socket = socket.create_connection(("127.0.0.1", port_of(running)), timeout=30)
        self.socket.sendall(request_bytes(max_tokens=num_tokens, return_token_ids=True))

    def is_unharmed(self):
        """Read to the end; every token must have come."""
        with self.socket, self.socket.makefile("rb") as lines:
            ids = []
            for line in lines:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    ids += [token for choice in event["choices"] for token in choice["token_ids"]]
                elif line.startswith(b"data: [DONE]"):
                    return len(ids) == self.num_tokens
        return False


def is_idle(running):
    """Within some seconds nothing runs or waits, no KV block is held and the books balance."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        stats = running.admin("/admin/status")[1]["models"][0]["stats"]
        if (
            stats["num_running"] + stats["num_waiting"] == 0
            and stats["num_free_blocks"] == stats["num_blocks"]
            and stats["admitted"] == stats["finished"]
        ):
            return True
        time.sleep(0.05)
    return False


def num_fds(running):
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def assert_well(running):
    """It serves, holds nothing, and ends cleanly."""
    assert running.complete()[0] == 200
    assert is_idle(running)
    assert running.stop() == 0
    assert "Traceback" not in running.log


# --- clients


def test_a_thousand_clients_vanish_in_mid_stream(daemon):
    running = daemon(LLMD_LOG__ACCESS="true", **SLOW).ready()
    before = num_fds(running)
    witness = Witness(running)

    async def vanish(gate):
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(running))
            writer.write(request_bytes(max_tokens=120))
            await reader.readuntil(b"data: ")
            writer.transport.abort()  # no goodbye: a reset

    async def all_of_them():
        gate = asyncio.Semaphore(100)
        await asyncio.gather(*(vanish(gate) for _ in range(1000)))

    asyncio.run(all_of_them())
    assert witness.is_unharmed()
    assert is_idle(running)
    running.wait_for(" 499 ")
    assert sum(" 499 " in line for line in running.lines) == 1000  # one record each, aborted ones too
    assert num_fds(running) <= before + 2
    assert_well(running)


def test_slow_reader_is_cut_off(daemon):
    """It fills its buffers and no more; what others get does not wait for it."""
    # each piece bears the model's name: more than the kernel takes for the slow one, which is some megabytes
    size = {"LLMD_MODELS__0__SERVED_MODEL_NAME": "demo" * 4000, "FAKE_MAX_NUM_SEQS": "32"}
    running = daemon(**size, LLMD_SERVER__MAX_STREAM_BUFFER_BYTES="4096").ready()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port_of(running)))
        slow.sendall(request_bytes(max_tokens=100, n=8, return_token_ids=True))
        assert Witness(running).is_unharmed()
        running.wait_for("its reader is too slow, aborted")
        assert is_idle(running)
        slow.settimeout(20)
        told = b""
        while b"[DONE]" not in told and (piece := slow.recv(65536)):
            told = told[-65536:] + piece
        assert b"the output was read too slowly" in told
    assert_well(running)


def test_half_open_connections(daemon):
    """Half a request line, half a head, half a body, and a client that closes its writing side."""
    running = daemon(**SLOW).ready()
    halves = [b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le", request_bytes()[:-10]]
    witness = Witness(running)
    with contextlib.ExitStack() as stack:
        for half in halves * 20:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port_of(running)), timeout=20))
            client.sendall(half)
        closing = stack.enter_context(socket.create_connection(("127.0.0.1", port_of(running)), timeout=20))
        closing.sendall(request_bytes(max_tokens=5))
        closing.shutdown(socket.SHUT_WR)
        assert witness.is_unharmed()
        assert running.complete()[0] == 200
    assert_well(running)


def flood(running, head, piece, most):
    """Send without end until the other side refuses; what it said, if anything, and how much it took."""
    sent = 0
    with socket.create_connection(("127.0.0.1", port_of(running)), timeout=20) as client:
        client.sendall(head)
        with contextlib.suppress(OSError):
            while sent < most:
                client.sendall(piece)
                sent += len(piece)
        with contextlib.suppress(OSError):
            return client.recv(4096), sent
    return b"", sent


def test_header_flood(daemon):
    running = daemon(**SLOW).ready()
    witness = Witness(running)
    for piece in (b"X-More: " + b"a" * 1000 + b"\r\n", b"a" * 65536):
        answer, sent = flood(running, b"GET /health HTTP/1.1\r\nHost: x\r\nX-First: ", piece, 64 << 20)
        assert sent < 64 << 20
        assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.0 400", b"")
    assert witness.is_unharmed()
    assert_well(running)


def test_body_flood(daemon):
    """A body that says it is too long is refused unread; one that does not say is cut off where it is."""
    running = daemon(LLMD_SERVER__MAX_BODY_BYTES="1048576", **SLOW).ready()
    witness, before_kib = Witness(running), peak_kib(running)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer, _ = flood(running, head + b"Content-Length: 9999999999\r\n\r\n", b"a" * 65536, 256 << 20)
    assert answer[:12] in (b"HTTP/1.1 413", b"")
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    answer, _ = flood(running, head + b"Transfer-Encoding: chunked\r\n\r\n", chunk, 128 << 20)
    assert answer[:12] in (b"HTTP/1.1 413", b"")
    assert peak_kib(running) - before_kib < 32 << 10
    assert witness.is_unharmed()
    assert_well(running)


# --- files


def test_disk_full_for_logs(daemon, tmp_path):
    """stderr that takes nothing: requests are served all the same."""
    with open("/dev/full", "w") as full:
        running = daemon(stderr=full, LLMD_SERVER__UDS=str(tmp_path / "api.sock"))
        deadline = time.monotonic() + 60
        status = 0
        while status != 200 and time.monotonic() < deadline:
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                status, _ = unix_request(str(tmp_path / "api.sock"), "/ready")
        for _ in range(3):
            status, answer = unix_request(
                str(tmp_path / "api.sock"), "/v1/completions", {"prompt": "hello", "max_tokens": 4}
            )
            assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
        assert running.stop() == 0


def no_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # each write to a file fails


def test_disk_full_for_state(daemon, tmp_path):
    """Nothing of the journal or of a flight record can be written: that is told, and requests are served."""
    (tmp_path / "state").mkdir()
    running = daemon(preexec=no_room, LLMD_HEALTH__STATE_DIR=str(tmp_path / "state"), **SLOW).ready()
    witness = Witness(running)
    running.signal(signal.SIGQUIT)
    assert running.complete()[0] == 200
    assert witness.is_unharmed()
    assert is_idle(running)
    running.wait_for("WARNING|ERROR")
    assert running.stop() == 0


def write(tmp_path, text):
    (tmp_path / "llmd.toml").write_text(text)


GARBAGE = ("\x00\x01\x02", "[server", "[[models]]\nmodel = 7\n", "server = 1\n", "", "[server]\nport = 'x'\n")


def test_config_replaced_by_garbage(daemon, tmp_path):
    good = "[server]\napi_keys = ['one']\n"
    write(tmp_path, good)
    running = daemon("--config", "llmd.toml", **SLOW).ready()
    for text in GARBAGE:
        write(tmp_path, text)
        num_lines = len(running.lines)
        running.signal(signal.SIGHUP)
        running.wait_for("reload refused", after=num_lines)
        assert running.get("/v1/models", Authorization="Bearer one")[0] == 200
        assert running.get("/v1/models")[0] == 401
    (tmp_path / "llmd.toml").unlink()
    num_lines = len(running.lines)
    running.signal(signal.SIGHUP)
    running.wait_for("reload refused", after=num_lines)
    assert running.get("/v1/models", Authorization="Bearer one")[0] == 200
    assert running.stop() == 0


# --- signals


def test_sighup_storm(daemon, tmp_path):
    """However many signals: each reload that begins ends, the last one sees the last file, streams go on."""
    write(tmp_path, "[log]\nlevel = 'info'\n")
    systemd = NotifySocket(f"@llmd-storm-{os.getpid()}")
    running = daemon("--config", "llmd.toml", NOTIFY_SOCKET=f"@llmd-storm-{os.getpid()}", **SLOW).ready()
    witness = Witness(running)
    for _ in range(200):
        running.signal(signal.SIGHUP)
        time.sleep(0.002)
    write(tmp_path, "[log]\nlevel = 'debug'\n")
    running.signal(signal.SIGHUP)
    running.wait_for("reload: log.level: applied")
    assert witness.is_unharmed()
    heard = systemd.listen(0.5)
    systemd.close()
    states = [name for message in heard for name in ("RELOADING", "READY") if name in message]
    assert states[0] == "READY"  # start-up
    assert states[1:] == ["RELOADING", "READY"] * (len(states) // 2)
    assert len(states) > 3
    assert_well(running)


def test_sighup_while_loading_says_nothing_of_ready(daemon, tmp_path):
    write(tmp_path, "[log]\nlevel = 'info'\n")
    systemd = NotifySocket(f"@llmd-loading-{os.getpid()}")
    running = daemon("--config", "llmd.toml", FAKE_LOAD_S="1.5", NOTIFY_SOCKET=f"@llmd-loading-{os.getpid()}")
    running.wait_for("listens on")
    running.signal(signal.SIGHUP)
    running.wait_for("reloaded")
    running.ready()
    heard = systemd.listen(0.3)
    systemd.close()
    assert [name for message in heard for name in ("RELOADING", "READY") if name in message] == ["READY"]
    assert_well(running)


@pytest.mark.parametrize("delay_s", [0.0, 0.3, 0.8])
def test_sigterm_at_any_moment_of_the_start(daemon, delay_s):
    running = daemon(FAKE_LOAD_S="30")
    running.wait_for("listens on")
    time.sleep(delay_s)
    assert running.stop() == 0
    assert "Traceback" not in running.log


def test_kill_9_and_restart(daemon, tmp_path):
    """What the dead process left behind, its sockets' files, keeps nobody from starting."""
    api = str(tmp_path / "api.sock")
    first = daemon(LLMD_SERVER__UDS=api, **SLOW).ready()
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    assert os.path.exists(api)
    second = daemon(LLMD_SERVER__UDS=api).ready()
    assert second.admin("/health")[0] == 200
    third = daemon(LLMD_SERVER__UDS=api)
    assert third.process.wait(60) == 75  # a living one is not pushed aside
    assert second.admin("/health")[0] == 200
    assert second.stop() == 0
    assert not os.path.exists(api)


# --- the machine


CLOCK_STEPS = """
import sys, time
offset, clock = [0.0], time.time
time.time = lambda: clock() + offset[0]
import threading
def step():
    while True:
        for to in (-1e9, 1e9, 0.0):
            time.sleep(0.1)
            offset[0] = to
threading.Thread(target=step, daemon=True).start()
import llmd
sys.exit(llmd.serve(model="demo", host="127.0.0.1"))
"""


def test_clock_steps(daemon):
    """The wall clock jumps by decades; deadlines, rates and the drain go by another one."""
    running = daemon(program=CLOCK_STEPS, LLMD_SERVER__REQUEST_TIMEOUT_S="20", **SLOW).ready()
    witnesses = [Witness(running) for _ in range(4)]
    assert running.get("/metrics")[0] == 200
    assert [witness.is_unharmed() for witness in witnesses] == [True] * 4
    assert running.complete(stream=False)[0] == 200
    assert running.stop() == 0
    assert "Traceback" not in running.log


def few_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def test_out_of_file_descriptors(daemon):
    """More clients than descriptors: those inside are served, and so are others when there is room again."""
    running = daemon(preexec=few_descriptors, **SLOW).ready()
    witness = Witness(running)
    clients = []
    for _ in range(200):
        client = socket.socket()
        client.setblocking(False)
        clients.append(client)
        with contextlib.suppress(BlockingIOError):
            client.connect(("127.0.0.1", port_of(running)))
    time.sleep(0.5)
    cpu_before_s = cpu_s(running)
    assert witness.is_unharmed()
    assert cpu_s(running) - cpu_before_s < 3  # it does not spin on what it cannot accept
    for client in clients:
        client.close()
    deadline = time.monotonic() + 20
    status = 0
    while status != 200 and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            status = running.complete()[0]
    assert status == 200
    assert is_idle(running)
    assert running.stop() == 0


def peak_kib(running):
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def cpu_s(running):
    fields = Path(f"/proc/{running.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
