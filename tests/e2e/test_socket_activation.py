"""Sockets that a supervisor holds: who connects while the daemon restarts waits, and is served by the next process."""

import asyncio
import contextlib
import json
import os
import signal
import socket

import pytest
from daemons import Daemon, unix_request

NUM_CLIENTS = 200
NUM_TOKENS = 8


@pytest.fixture
def supervisor(tmp_path):
    """A program that holds sockets, by name, and starts daemons with them."""
    held, running = [], []

    def listen(name, family=socket.AF_INET):
        made = socket.socket(family)
        made.bind(str(tmp_path / f"{name}.sock") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        made.listen(1024)
        held.append((name, made))
        return made.getsockname()

    def start(**options):
        running.append(Daemon("serve", "demo", cwd=tmp_path, sockets=held, **options))
        return running[-1]

    yield listen, start
    for made in running:
        made.__exit__()
    for _, made in held:
        made.close()


async def complete(port):
    """One request over a connection of its own; the number of tokens, or what went wrong."""
    body = json.dumps({"prompt": "hello", "max_tokens": NUM_TOKENS, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"]
    except (OSError, ValueError, KeyError) as error:
        return repr(error)


async def clients(port, restart):
    """All clients, spread over the restart and a second before it."""
    tasks = []
    restarting = asyncio.get_running_loop().run_in_executor(None, restart)
    for _ in range(NUM_CLIENTS):
        tasks.append(asyncio.create_task(complete(port)))
        await asyncio.sleep(0.01)
    await restarting
    return await asyncio.gather(*tasks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["drained", "killed when idle"])
def test_no_client_is_lost_by_a_restart(supervisor, number):
    listen, start = supervisor
    _, port = listen("api")
    first = start(FAKE_STEP_S="0.005").ready()

    def restart():
        first.signal(number)
        first.process.wait(60)
        start(FAKE_STEP_S="0.005").ready()

    if number is signal.SIGKILL:
        restart()  # nobody is connected: all of them come to a socket without a process behind it
        answers = asyncio.run(clients(port, lambda: None))
    else:
        answers = asyncio.run(clients(port, restart))
        assert first.process.returncode == 0
    assert [answer for answer in answers if answer != NUM_TOKENS] == []


def test_clients_wait_until_it_is_ready(supervisor):
    """Operators are answered while it loads."""
    listen, start = supervisor
    _, port = listen("api")
    admin = listen("admin", socket.AF_UNIX)
    running = start(FAKE_LOAD_S="1.5")
    running.wait_for("clients wait")

    async def ask():
        waiting = asyncio.create_task(complete(port))
        await asyncio.sleep(0.2)
        ready = await asyncio.to_thread(unix_request, admin, "/ready")
        return waiting.done(), ready[0], await waiting

    assert asyncio.run(ask()) == (False, 503, NUM_TOKENS)
    assert running.stop() == 0
    assert os.path.exists(admin)  # the supervisor's, not ours to remove


def test_each_name_is_served_by_its_own_listener(supervisor):
    listen, start = supervisor
    _, api = listen("api")
    admin = listen("admin", socket.AF_UNIX)
    _, metrics = listen("metrics")
    running = start(LLMD_SERVER__API_KEYS="secret").ready()
    assert unix_request(admin, "/admin/status")[1]["state"] == "ready"
    assert unix_request(admin, "/v1/models")[0] == 404

    def get(port, path):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            return int(client.makefile("rb").readline().split()[1])

    assert get(metrics, "/metrics") == 200
    assert [get(metrics, path) for path in ("/v1/models", "/admin/status", "/health")] == [404, 404, 404]
    assert [get(api, path) for path in ("/metrics", "/v1/models", "/admin/status")] == [401, 401, 403]
    assert running.stop() == 0


@pytest.mark.parametrize(
    ("name", "family", "line"),
    [
        ("api2", socket.AF_INET, "a socket is handed down as 'api2'; allowed"),
        ("admin", socket.AF_INET, "the socket handed down as 'admin' is no UNIX socket"),
    ],
)
def test_sockets_that_cannot_be_used_stop_the_start(supervisor, name, family, line):
    listen, start = supervisor
    listen(name, family)
    running = start()
    assert running.process.wait(60) == 78
    running.__exit__()
    assert line in running.log
