"""TTFT of a key that sends one request a second: alone, and beside a key that keeps 500 requests in the queue.

    python benchmarks/serve/fairness.py [--model demo] [--load-format dummy] [--seconds 20] [--output FILE]

A daemon of its own for each policy; the flood comes from a process of its own, so that reading its streams delays no
measured one. The figure is a ratio: the 95th percentile beside the flood over that of the same daemon when idle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import report
from startup import free_port, is_ready

CONFIG = """
[[models]]
model = {model}
load_format = {load_format}
[scheduler]
policy = "{policy}"
max_num_seqs = {max_num_seqs}
[server]
port = {port}
[log]
access = false
[[keys]]
name = "flood"
key = "flood"
[[keys]]
name = "light"
key = "light"
"""
_READY_S = 300.0
_PATIENCE_S = 30.0  # after which a client of the light key gives up; it counts as so much


def prompt(options: argparse.Namespace, length: int) -> list[int]:
    """Random token ids: no two requests share a prefix."""
    return [random.randrange(10, options.vocab_size) for _ in range(length)]


async def ttft_s(session: aiohttp.ClientSession, url: str, key: str, body: dict[str, Any]) -> float:
    """Seconds to the first event of one stream, which is then read to its end."""
    began = time.perf_counter()
    headers = {"Authorization": f"Bearer {key}"}
    async with session.post(f"{url}/v1/completions", json={"stream": True, **body}, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: "):
                break
        first = time.perf_counter() - began
        async for _ in answer.content:
            pass
    return first


async def patient_ttft_s(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> float:
    """The light key's; no longer than its client waits."""
    try:
        return await asyncio.wait_for(ttft_s(session, url, "light", body), _PATIENCE_S)
    except TimeoutError:
        return _PATIENCE_S


async def light(options: argparse.Namespace, url: str) -> list[float]:
    """One request a second, each without waiting for the one before."""
    found: list[asyncio.Task[float]] = []
    async with aiohttp.ClientSession() as session:
        for _ in range(options.seconds):
            body = {"prompt": prompt(options, options.light_prompt), "max_tokens": options.light_output, "ignore_eos": True}
            found.append(asyncio.create_task(patient_ttft_s(session, url, body)))
            await asyncio.sleep(1)
        return sorted(await asyncio.gather(*found))


async def _flood(options: argparse.Namespace, url: str) -> None:
    async def client(session: aiohttp.ClientSession) -> None:
        while True:
            body = {"prompt": prompt(options, options.flood_prompt), "max_tokens": options.flood_output, "ignore_eos": True}
            await ttft_s(session, url, "flood", body)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        await asyncio.gather(*(client(session) for _ in range(options.flood)))


def flood(options: argparse.Namespace, url: str) -> None:
    """Keep so many requests of one key in the daemon; until it is ended from outside."""
    asyncio.run(_flood(options, url))


def start(options: argparse.Namespace, policy: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A daemon with that policy, ready."""
    port = free_port()
    text = CONFIG.format(
        model=json.dumps(options.model), load_format=json.dumps(options.load_format), policy=policy, port=port,
        max_num_seqs=options.max_num_seqs,
    )  # fmt: skip
    file = folder / f"{policy}.toml"
    file.write_text(text)
    file.chmod(0o600)
    with (folder / f"{policy}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "llmd", "--config", str(file)], stderr=log)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + _READY_S
    while not is_ready(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit((folder / f"{policy}.log").read_text())
        time.sleep(0.1)
    return process, url


def summary(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    p95 = values[min(len(values) - 1, int(0.95 * len(values)))]
    return {"median_ms": round(1e3 * statistics.median(values), 1), "p95_ms": round(1e3 * p95, 1)}


def measure(options: argparse.Namespace, policy: str, folder: Path) -> dict[str, Any]:
    """Idle and flooded, on one daemon."""
    process, url = start(options, policy, folder)
    flooding = multiprocessing.get_context("spawn").Process(target=flood, args=(options, url), daemon=True)
    try:
        warm = argparse.Namespace(**{**vars(options), "seconds": 2})
        asyncio.run(light(warm, url))
        idle = asyncio.run(light(options, url))
        flooding.start()
        time.sleep(options.settle_s)
        flooded = asyncio.run(light(options, url))
    finally:
        if flooding.pid is not None:
            flooding.terminate()
            flooding.join()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    found = {"idle": summary(idle), "flooded": summary(flooded)}
    return {**found, "p95_ratio": round(found["flooded"]["p95_ms"] / found["idle"]["p95_ms"], 2)}


def main() -> None:
    """Run each policy and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--policies", nargs="+", default=["fair", "fcfs"])
    parser.add_argument("--vocab-size", type=int, default=300, help="ids of prompts are below this")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--flood", type=int, default=500)
    parser.add_argument("--flood-prompt", type=int, default=256)
    parser.add_argument("--flood-output", type=int, default=256)
    parser.add_argument("--light-prompt", type=int, default=512)
    parser.add_argument("--light-output", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--settle-s", type=float, default=8.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {policy: measure(options, policy, Path(folder)) for policy in options.policies}
    setting = {name: value for name, value in vars(options).items() if name not in ("output", "policies")}
    report({"setting": setting, **figures}, options.output)


if __name__ == "__main__":
    main()
