"""How the daemon goes away: what runs ends, what does not is told why, and nobody who was let in is sent away."""

import contextlib
import json
import signal
import socket
import threading
import time

import pytest
from daemons import Daemon


@pytest.fixture
def daemon(tmp_path):
    """Start daemons with an admin socket; they end with the test."""
    running = []

    def start(**options):
        socket_path = str(tmp_path / "admin.sock")
        running.append(Daemon("serve", "demo", cwd=tmp_path, LLMD_SERVER__ADMIN_SOCKET=socket_path, **options))
        return running[-1]

    yield start
    for made in running:
        made.__exit__()


@pytest.fixture
def connect():
    """Open connections to a daemon; they close with the test."""
    opened = []

    def make(running):
        opened.append(Client(running.url))
        return opened[-1]

    yield make
    for client in opened:
        client.socket.close()


class Client:
    """A connection that says and hears exactly what the test wants."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)

    def send(self, path="/v1/completions", **fields):
        """A request; without fields a GET."""
        body = json.dumps({"prompt": "hello", "ignore_eos": True, **fields}).encode() if fields else b""
        head = f"{'POST' if fields else 'GET'} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def read_until(self, end: bytes) -> bytes:
        """What comes up to and with `end`, or all until the other side hangs up."""
        data = b""
        while end not in data and (piece := self.socket.recv(65536)):
            data += piece
        return data

    def is_hung_up(self) -> bool:
        """Whether the other side closes, without a word, within some seconds."""
        self.socket.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            return self.socket.recv(1) == b""
        return True


def events(data: bytes):
    """The JSON events of a stream."""
    lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def test_drain_over_the_admin_socket(daemon, connect):
    running = daemon(FAKE_STEP_S="0.03").ready()
    client = connect(running)
    client.send(max_tokens=40, stream=True)
    client.read_until(b"data: ")
    status, answer = running.admin("/admin/drain", {})
    assert (status, answer["state"], answer["num_requests"]) == (200, "draining", 1)
    assert running.admin("/ready")[0] == 503
    assert running.admin("/admin/drain", {})[0] == 200  # asking once more hurries nothing
    assert b"[DONE]" in client.read_until(b"[DONE]")
    assert running.process.wait(30) == 0
    running.wait_for(r"POST /admin/drain by uid-\d+: draining")


def test_drain_now_ends_what_runs(daemon, connect):
    running = daemon(FAKE_STEP_S="0.05").ready()
    client = connect(running)
    client.send(max_tokens=120, stream=True)
    client.read_until(b"data: ")
    start_s = time.monotonic()
    assert running.admin("/admin/drain", {"now": True})[1]["timeout_s"] == 0
    last = events(client.read_until(b"[DONE]"))[-1]
    assert last["error"]["message"] == "the server is draining"
    assert running.process.wait(30) == 0
    assert time.monotonic() - start_s < 10


def test_what_is_not_done_in_time_ends_with_an_error_and_its_usage(daemon, connect):
    running = daemon(FAKE_STEP_S="0.05", LLMD_SERVER__DRAIN_TIMEOUT_S="1").ready()
    clients = [connect(running) for _ in range(4)]
    for index, client in enumerate(clients):
        client.send(max_tokens=10 if index == 0 else 120, stream=True, return_token_ids=True)
    heads = [client.read_until(b"data: ") for client in clients]
    running.signal(signal.SIGTERM)
    answers = [head + client.read_until(b"[DONE]") for head, client in zip(heads, clients, strict=True)]
    assert running.process.wait(30) == 0
    assert events(answers[0])[-1]["choices"][0]["finish_reason"] == "length"
    for answer in answers[1:]:
        *pieces, last = events(answer)
        assert last["error"]["code"] == "service_unavailable"
        ids = [token for piece in pieces for choice in piece["choices"] for token in choice["token_ids"]]
        assert 10 <= len(ids) < 120
        assert len(ids) <= last["usage"]["completion_tokens"] <= len(ids) + 3  # half a character is counted and not shown


def test_connections_at_the_drain(daemon, connect):
    """Idle ones are closed at once, silent ones are heard, busy ones close behind their answer."""
    running = daemon(FAKE_STEP_S="0.03").ready()
    idle, silent, busy = (connect(running) for _ in range(3))
    idle.send("/health")
    assert b"200 OK" in idle.read_until(b'"ok"}')
    busy.send(max_tokens=60, stream=True)
    busy.read_until(b"data: ")
    time.sleep(0.1)  # the connection of the silent one is accepted
    running.signal(signal.SIGTERM)
    running.wait_for("SIGTERM: draining")
    assert idle.is_hung_up()
    silent.send(max_tokens=3)
    answer = silent.read_until(b"usage")
    assert b"200 OK" in answer
    assert b"Connection: close" in answer
    assert b"[DONE]" in busy.read_until(b"[DONE]")
    busy.read_until(b"never")  # up to the end
    assert busy.is_hung_up()
    assert running.process.wait(30) == 0


def test_a_connection_that_stays_silent_holds_nothing_up(daemon, connect):
    running = daemon().ready()
    silent = connect(running)
    time.sleep(0.1)
    start_s = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - start_s < 5
    assert silent.is_hung_up()


def test_slow_reader_gets_all_of_its_answer(daemon, connect):
    """The engine is long done when the client reads on: the drain waits for it."""
    size = {"FAKE_MAX_MODEL_LEN": "2048", "LLMD_SERVER__MAX_STREAM_BUFFER_BYTES": "16777216"}
    running = daemon(**size).ready()
    client = connect(running)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.send(max_tokens=2000, stream=True, return_token_ids=True, logprobs=5)
    head = client.read_until(b"data: ")
    running.signal(signal.SIGTERM)
    running.wait_for("SIGTERM: draining")
    time.sleep(1)
    answer = head + client.read_until(b"[DONE]")
    assert b"[DONE]" in answer
    assert running.process.wait(60) == 0


def test_second_signal_ends_it_at_once(daemon, connect):
    running = daemon(FAKE_STEP_S="0.2").ready()
    client = connect(running)
    client.send(max_tokens=120, stream=True)
    client.read_until(b"data: ")
    running.signal(signal.SIGTERM)
    running.wait_for("draining")
    start_s = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - start_s < 5
    assert "error" in events(client.read_until(b"[DONE]"))[-1]


def test_signals_from_many_threads_are_one_drain(daemon):
    running = daemon().ready()
    threads = [threading.Thread(target=running.signal, args=(signal.SIGTERM,)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert running.process.wait(30) == 0
