"""How many SSE chunks one core sends: many concurrent chat streams, the server on one core, the client on another.

    python benchmarks/serve/sse.py [--streams 2000] [--tokens 100] [--rounds 3] [--with-text] [--output FILE]

The server is the real app (middlewares, authentication, OpenAI routes, RequestStream, SSE) on uvloop; behind it stands an
engine that hands every stream one token a step, as fast as readers take them. `--with-text` puts the real output
processor and a byte-level tokenizer in between. The client is a bare asyncio.Protocol in a process of its own that checks
status, text and [DONE] of every stream. Reported per round: chunks a second of wall time, server CPU microseconds a
chunk, chunks a second of server CPU (what a core of its own would give), and errors. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent.parent
BODY = {"messages": [{"role": "user", "content": "Count."}], "stream": True, "temperature": 0}
WORD = " word"


# --- the server


class Pump:
    """A model service that is nothing but streams: one token a step for each of them, once all are there."""

    def __init__(self, num_streams: int, num_tokens: int, with_text: bool) -> None:
        from llmd.engine.executor import LoadProgress

        self.names, self.state, self.max_model_len = ("bench",), "ready", 1 << 16
        self.progress, self.created_s, self.engine = LoadProgress("ready", 1.0), time.time(), self
        self.failure: BaseException | None = None
        self.chat_template = SimpleNamespace(templates={})
        self.parsers = SimpleNamespace(tool=None, reasoning=None)
        self.num_streams, self.num_tokens = num_streams, num_tokens
        self.streams: list[Any] = []
        self.outputs = self._text() if with_text else None
        self.task: asyncio.Task[None] | None = None
        self.figures: dict[str, float] = {}

    def _text(self) -> Any:
        sys.path.insert(0, str(ROOT / "benchmarks" / "engine"))
        from publish import made_up_tokenizer

        from llmd.text.output import OutputProcessor

        outputs = OutputProcessor(made_up_tokenizer(4096), max_buffer_bytes=4 << 20)
        outputs.bind(self)  # type: ignore[arg-type]
        return outputs

    # what the routes ask of a service and its engine

    def check_admission(self, num_tokens: int = 0, num_requests: int = 1) -> None:
        """Everybody may come."""

    def abort(self, request_id: str, reason: Any = None) -> None:
        """Nothing runs."""

    def render_chat(self, messages: Any, **arguments: Any) -> str:
        """Any prompt will do."""
        return "x"

    def sampling_params(self, overrides: dict[str, Any]) -> Any:
        """As asked."""
        from llmd.engine.params import SamplingParams

        return SamplingParams(**overrides)

    async def generate(self, prompt: Any, params: Any, *, request_id: str, **options: Any) -> Any:
        """A stream that waits until all streams are there."""
        from llmd.engine.request import Prompt, Request
        from llmd.text.stream import RequestStream

        request = Request(request_id=request_id, prompt=Prompt((1, 2, 3)), params=params)
        stream = self.outputs.open(request) if self.outputs else RequestStream(request, lambda stream: None, 4 << 20)
        self.streams.append(stream)
        if len(self.streams) == self.num_streams:
            self.task = asyncio.create_task(self._run())
        return stream

    # the steps

    async def _run(self) -> None:
        from llmd.engine.step import FinishReason

        streams, self.streams = self.streams, []
        await asyncio.sleep(0.2)
        wall_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        for step in range(self.num_tokens):
            reason = FinishReason.LENGTH if step == self.num_tokens - 1 else None
            self._step(streams, reason)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        while any(not stream.is_closed for stream in streams):
            await asyncio.sleep(0.001)
        now = resource.getrusage(resource.RUSAGE_SELF)
        user_s, system_s = now.ru_utime - before.ru_utime, now.ru_stime - before.ru_stime
        self.figures = {"wall_s": time.monotonic() - wall_s, "cpu_s": user_s + system_s, "system_s": system_s}

    def _step(self, streams: list[Any], reason: Any) -> None:
        from llmd.engine.step import SequenceDelta
        from llmd.text.stream import TextDelta

        if self.outputs is not None:
            ids = [stream.request.request_id for stream in streams]
            self.outputs.publish([SequenceDelta(name, 0, (2000,), finish_reason=reason) for name in ids])
            return
        for stream in streams:
            stream.num_output_tokens += 1
            stream.first_token_s = stream.first_token_s or time.monotonic()
            stream.put(TextDelta(stream.request.request_id, 0, WORD, (7,), finish_reason=reason))


async def serve(options: argparse.Namespace) -> None:
    """Serve until stdin closes; tell the port, and the figures of a round whenever a line is read."""
    from aiohttp import web

    from llmd.config import Config
    from llmd.server.app import ServerContext, create_app, make_runner
    from llmd_plugins import openai
    from llmd_plugins.auth import api_keys

    pump = Pump(options.streams, options.tokens, options.with_text)
    context = ServerContext(
        config=Config.model_validate({"server": {"api_keys": ("bench-key",)}}),
        services={"bench": pump},  # type: ignore[dict-item]
        routes=openai.llmd_register_routes(),
        authenticators=api_keys.llmd_register_authenticators(),
        sections={"openai": openai.OpenAISettings()},
        state="ready",
    )
    runner = make_runner(create_app(context))
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
    await web.SockSite(runner, sock, backlog=4096).start()
    print(json.dumps({"port": sock.getsockname()[1]}), flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        if pump.task is not None:
            await pump.task
        print(json.dumps(pump.figures), flush=True)


# --- the client


class Client(asyncio.Protocol):
    """One stream: counts events and text as bytes, remembers the end."""

    def __init__(self, request: bytes) -> None:
        self.request, self.done = request, asyncio.get_running_loop().create_future()
        self.num_events = self.num_words = self.num_bytes = 0
        self.status = b""
        self.tail = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self.transport = transport  # type: ignore[assignment]
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Count what is whole; an event that is cut in two is counted with its second half."""
        if not self.status:
            self.status = data[9:12]
        self.num_bytes += len(data)
        data = self.tail + data
        cut = data.rfind(b"\n\n") + 2
        whole, self.tail = data[:cut], data[cut:]
        self.num_events += whole.count(b"data: {")
        self.num_words += whole.count(b'"content":"')
        if b"data: [DONE]" in whole and not self.done.done():
            self.done.set_result(True)

    def connection_lost(self, error: Exception | None) -> None:
        """Before the end, that is an error."""
        if not self.done.done():
            self.done.set_result(False)


async def one_round(port: int, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """Open all streams, wait for their ends, count."""
    body = json.dumps(BODY | {"max_tokens": num_tokens}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer bench-key\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(num_streams):
        _, client = await loop.create_connection(lambda: Client(head.encode() + body), "127.0.0.1", port)
        clients.append(client)
    ended = await asyncio.gather(*(client.done for client in clients))
    errors = sum(
        not has_ended or client.status != b"200" or client.num_words > num_tokens
        for has_ended, client in zip(ended, clients, strict=True)
    )
    for client in clients:
        client.transport.close()
    await asyncio.sleep(0.1)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "errors": errors,
        "num_chunks": sum(client.num_events for client in clients),
        "num_bytes": sum(client.num_bytes for client in clients),
        "client_cpu_s": usage.ru_utime + usage.ru_stime,
    }


# --- the whole


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start the server, run the rounds, gather the figures."""
    cores = sorted(os.sched_getaffinity(0))
    command = [
        sys.executable,
        __file__,
        "--role",
        "server",
        "--streams",
        str(options.streams),
        "--tokens",
        str(options.tokens),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "plugins", "kernels"))}
    server = subprocess.Popen(
        command + ["--with-text"] * options.with_text,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, cores[:1]),
    )
    os.sched_setaffinity(0, cores[-1:])
    assert server.stdin is not None
    assert server.stdout is not None
    port = json.loads(server.stdout.readline())["port"]
    rounds = []
    client_cpu_s = 0.0
    for _ in range(options.rounds):
        seen = _run_loop(one_round(port, options.streams, options.tokens))
        print("next", file=server.stdin, flush=True)
        figures = json.loads(server.stdout.readline())
        seen["client_cpu_s"], client_cpu_s = seen["client_cpu_s"] - client_cpu_s, seen["client_cpu_s"]
        rounds.append({**seen, **figures, **_rates(seen["num_chunks"], figures)})
    server.stdin.close()
    server.wait(10)
    median = {
        name: round(statistics.median(entry[name] for entry in rounds), 2)
        for name in ("chunks_per_s", "cpu_us_per_chunk", "system_us_per_chunk", "chunks_per_cpu_s")
    }
    return {
        "streams": options.streams,
        "tokens": options.tokens,
        "with_text": options.with_text,
        "errors": sum(entry["errors"] for entry in rounds),
        **median,
        "rounds": rounds,
    }


def _rates(num_chunks: int, figures: dict[str, float]) -> dict[str, float]:
    return {
        "chunks_per_s": num_chunks / figures["wall_s"],
        "cpu_us_per_chunk": 1e6 * figures["cpu_s"] / num_chunks,
        "system_us_per_chunk": 1e6 * figures["system_s"] / num_chunks,
        "chunks_per_cpu_s": num_chunks / figures["cpu_s"],
        "server_core_share": figures["cpu_s"] / figures["wall_s"],
    }


def _run_loop(work: Any) -> Any:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--with-text", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--role", choices=["server"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.role == "server":
        _run_loop(serve(options))
        return
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from results import report

    report(run(options), options.output)


if __name__ == "__main__":
    main()
