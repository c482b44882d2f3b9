"""`llmd serve` in a process of its own, asked over HTTP by one client: every prompt is a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from . import Generated, die_with_parent

_READY_S = 120.0


def _free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=1) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


class Engine:
    """The server with the settings that llmd.LLM has in process; this process is the client."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}"
        flags = {
            "--port": port,
            "--served-model-name": "bench",
            "--device": "cpu",
            "--dtype": "bfloat16",
            "--max-model-len": options["max_model_len"],
            "--max-num-seqs": options["max_num_seqs"],
            "--kv-cache-memory-bytes": options["kv_bytes"],
        }
        if options["format"] != "bf16":
            flags["--quantization"] = options["format"]
        command = [sys.executable, "-m", "llmd", "serve", model, *(str(part) for flag in flags.items() for part in flag)]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _READY_S
        while not _is_ready(self._url):
            if self._server.poll() is not None:
                raise RuntimeError(f"llmd serve ended with {self._server.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"llmd serve is not ready after {_READY_S:.0f} s")
            time.sleep(0.02)

    def facts(self) -> dict[str, Any]:
        """What the server says of itself."""
        with urllib.request.urlopen(f"{self._url}/version", timeout=10) as answer:
            return dict(json.load(answer))

    def prepare(self, num_seqs: int, max_len: int) -> None:
        """Nothing depends on the work."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Generated:
        """All streams at once, read to their end."""
        return Generated(asyncio.run(self._ask_all(prompts, num_tokens)), [])

    async def _ask_all(self, prompts: list[list[int]], num_tokens: int) -> list[int]:
        from aiohttp import ClientSession, ClientTimeout, TCPConnector

        from llmd_plugins.commands.bench.client import Target, ask
        from llmd_plugins.commands.bench.datasets import BenchRequest

        target = Target(
            url=f"{self._url}/v1/completions",
            model="bench",
            is_chat=False,
            ignore_eos=True,
            sampling={"temperature": 0.0},
        )
        requests = [BenchRequest(prompt, len(prompt), num_tokens) for prompt in prompts]
        async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None)) as session:
            results = await asyncio.gather(*(ask(session, target, request) for request in requests))
        for result in results:
            if result.error:
                raise RuntimeError(result.error)
        return [result.num_output_tokens for result in results]

    def close(self) -> None:
        """Stop the server."""
        self._server.terminate()
        self._server.wait(60)
