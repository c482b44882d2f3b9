"""What requests that must be refused cost: the time of each refusal, and what running streams feel of them.

    python benchmarks/serve/bad_requests.py [--rate 50] [--streams 4] [--rounds 3] [--slowest 10] [--output FILE]

The daemon has a process of its own and serves the demo model; the requests are those of the tests
(tests/plugins/openai/bad_requests.py). Each is sent alone, the first time it is seen and then twice again. After that,
`--streams` chat streams run in turn undisturbed and while a process of its own sends `--rate` bad requests a second: the
gaps between their events, at the client.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from startup import free_port, is_ready

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))
from plugins.openai.bad_requests import ALL, CHAT, HI, Bad
from results import report

JSON = {"Content-Type": "application/json"}
MAX_DISTURBING_BYTES = 1 << 20  # larger bodies measure the network
_START_S = 120


def refuse_s(port: int, bad: Bad) -> float:
    """Seconds from the first byte sent to the last one read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.connect()
        began = time.perf_counter()
        connection.request("POST", bad.path, bad.body, JSON)
        answer = connection.getresponse()
        answer.read()
        took_s = time.perf_counter() - began
    finally:
        connection.close()
    if answer.status != bad.status:
        raise SystemExit(f"{bad.name}: {answer.status} instead of {bad.status}")
    return took_s


def refusals(port: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, the first time it is seen and the best of two more."""
    figures = {}
    for bad in ALL:
        first, *again = (refuse_s(port, bad) * 1e3 for _ in range(3))
        figures[bad.name] = {"first_ms": round(first, 1), "again_ms": round(min(again), 1)}
    return figures


def attack(port: int, rate: float) -> None:
    """Send one after the other, at that rate, until killed."""
    sent = [bad for bad in ALL if len(bad.body) <= MAX_DISTURBING_BYTES]
    began = time.perf_counter()
    for number, bad in enumerate(itertools.cycle(sent)):
        time.sleep(max(0.0, began + number / rate - time.perf_counter()))
        refuse_s(port, bad)


async def gaps_of(url: str, num_streams: int, num_tokens: int) -> list[float]:
    """Milliseconds between the events of streams that run side by side."""
    body = {"messages": HI, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 1, "stream": True}

    async def read(session: aiohttp.ClientSession) -> list[float]:
        times = []
        async with session.post(url + CHAT, json=body) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
        return [(later - earlier) * 1e3 for earlier, later in itertools.pairwise(times)]

    async with aiohttp.ClientSession() as session:
        return [gap for gaps in await asyncio.gather(*(read(session) for _ in range(num_streams))) for gap in gaps]


def percentiles(gaps_ms: list[float]) -> dict[str, float]:
    """Median, p99 and the longest."""
    cuts = statistics.quantiles(gaps_ms, n=100)
    return {"p50_ms": round(cuts[49], 2), "p99_ms": round(cuts[98], 2), "max_ms": round(max(gaps_ms), 2)}


def disturbances(port: int, options: argparse.Namespace) -> dict[str, Any]:
    """Gaps of all rounds, undisturbed and disturbed in turn."""
    url, quiet, disturbed = f"http://127.0.0.1:{port}", [], []
    for _ in range(options.rounds):
        quiet += asyncio.run(gaps_of(url, options.streams, options.tokens))
        command = [sys.executable, __file__, "--attack", str(port), "--rate", str(options.rate)]
        attacker = subprocess.Popen(command)
        try:
            time.sleep(1.0)
            disturbed += asyncio.run(gaps_of(url, options.streams, options.tokens))
            if attacker.poll() is not None:
                raise SystemExit("the attacker ended early")
        finally:
            attacker.kill()
            attacker.wait()
    return {"undisturbed": percentiles(quiet), "disturbed": percentiles(disturbed)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start a daemon, measure, stop it."""
    port = free_port()
    command = [sys.executable, "-m", "llmd", "serve", "demo", "--port", str(port), "--dtype", "float32"]
    daemon = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_S
        while not is_ready(f"http://127.0.0.1:{port}"):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the daemon did not start")
            time.sleep(0.1)
        asyncio.run(gaps_of(f"http://127.0.0.1:{port}", 1, 8))
        each = refusals(port)
        gaps = disturbances(port, options)
    finally:
        daemon.terminate()
        daemon.wait()
    slowest = sorted(each.items(), key=lambda item: -item[1]["first_ms"])[: options.slowest]
    return {
        "num_requests": len(each),
        "rate": options.rate,
        "streams": options.streams,
        "gaps": gaps,
        "slowest": dict(slowest),
        "refusals": each,
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slowest", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--attack", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack is not None:
        attack(options.attack, options.rate)
        return
    figures = run(options)
    report(figures, options.output, shown=("num_requests", "rate", "streams", "gaps", "slowest"))


if __name__ == "__main__":
    main()
