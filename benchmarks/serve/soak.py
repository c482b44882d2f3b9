"""Many streams for a long time over the demo model: no token lost, doubled or changed, memory flat, nothing left behind.

    python benchmarks/serve/soak.py [--streams 1000] [--minutes 10] [--tokens 64] [--serve-args "..."] [--output FILE]

A daemon of its own serves the demo model; the client, in this process, keeps so many streams open that each ends and is
replaced by another. Of every stream it checks that as many token ids came as were asked for and as `usage` tells, that the
text is what the ids spell, and how far it is what the same request gave when it was alone. Meanwhile it samples the daemon's
memory, file descriptors and threads, and at the end reads its own figures: p99 of the event loop's lag, and whether
everything that was taken was given back. Prints one JSON object; exit status 1 if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from results import report  # noqa: E402

PROMPTS = (
    "Once upon a time", "The weather today is", "def fibonacci(n):", "Dear customer,", "In 1969, people",
    "A recipe for soup:", "The capital of France is", "To be or not to be,",
)  # fmt: skip
MAX_GROWTH = 0.05  # of memory after the first minute
MAX_UNLIKE = 0.01  # of answers: sums of a large batch round in another order
MAX_LAG_S = 0.050  # p99 of the event loop
_SAMPLE_S = 2.0


class Question(NamedTuple):
    """One request, the same each time it is asked."""

    prompt: str
    seed: int
    max_tokens: int

    def body(self, *, stream: bool) -> bytes:
        """The JSON of the request."""
        fields: dict[str, Any] = {**self._asdict(), "temperature": 0.8, "ignore_eos": True, "return_token_ids": True}
        return orjson.dumps({**fields, "stream": stream, **({"stream_options": {"include_usage": True}} if stream else {})})


class Answer(NamedTuple):
    """What came back."""

    token_ids: list[int]
    text: str
    num_counted: int  # by usage


@dataclass
class Tally:
    """What all clients saw."""

    num_streams: int = 0
    num_tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    num_unlike_alone: int = 0
    ttft_s: list[float] = field(default_factory=list)


class Daemon:
    """The daemon under test and what the system knows of it."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.admin = folder / "admin.sock"
        environment = os.environ | {"LLMD_SERVER__ADMIN_SOCKET": str(self.admin), "LLMD_LOG__ACCESS": "false"}
        self.log = folder / "log"
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "llmd", "serve", "demo", "--port", "0", *arguments]
            self.process = subprocess.Popen(command, env=environment, stderr=log)
        self.port = int(self._wait_for(r"listens on http://127\.0\.0\.1:(\d+)")[1])
        self._wait_for("ready after")

    def _wait_for(self, pattern: str) -> re.Match[str]:
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s and self.process.poll() is None:
            if match := re.search(pattern, self.log.read_text()):
                return match
            time.sleep(0.05)
        raise SystemExit(f"the daemon did not start:\n{self.log.read_text()}")

    def get(self, path: str) -> str:
        """A GET's body."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return str(answer.read().decode())

    def sample(self) -> dict[str, float]:
        """Resident bytes, open descriptors, threads, processor seconds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return {
            "rss_bytes": 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1]),  # type: ignore[index]
            "descriptors": len(os.listdir(f"/proc/{self.process.pid}/fd")),
            "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),  # type: ignore[index]
            "cpu_s": ticks / os.sysconf("SC_CLK_TCK"),
        }

    def engine_stats(self) -> dict[str, Any]:
        """The engine's counters, over the admin socket."""
        text = subprocess.check_output(["curl", "-s", "--unix-socket", str(self.admin), "http://localhost/admin/status"])
        stats: dict[str, Any] = json.loads(text)["models"][0]["stats"]
        return stats

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


# --- one request


async def ask(port: int, question: Question) -> tuple[Answer, float]:
    """Stream one answer over a connection of its own; with the seconds to its first token. Raises OSError, ValueError."""
    began_s = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        body = question.body(stream=True)
        # HTTP/1.0: the answer is not cut into chunks and ends with the connection
        head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError(f"{status.decode().strip()} {(await reader.read(2000)).decode(errors='replace')[-300:]}")
        return await _read_events(reader, began_s)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _read_events(reader: asyncio.StreamReader, began_s: float) -> tuple[Answer, float]:
    token_ids: list[int] = []
    texts: list[str] = []
    num_counted, first_s = -1, 0.0
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            return Answer(token_ids, "".join(texts), num_counted), first_s
        event = orjson.loads(line[6:])
        if "error" in event:
            raise ValueError(event["error"]["message"])
        for choice in event["choices"]:
            first_s = first_s or time.monotonic() - began_s
            token_ids += choice["token_ids"]
            texts.append(choice["text"])
        if event.get("usage"):
            num_counted = event["usage"]["completion_tokens"]
    raise ValueError(f"the stream ended after {len(token_ids)} tokens without [DONE]")


# --- the clients


class Clients:
    """So many streams at a time, until the time is over."""

    def __init__(self, port: int, num_streams: int, num_tokens: int, decode: Any) -> None:
        self._port, self._num_streams, self._decode = port, num_streams, decode
        lengths = [max(1, num_tokens * share // 4) for share in (1, 2, 3, 4)]
        self._questions = [Question(prompt, 7, lengths[index % 4]) for index, prompt in enumerate(PROMPTS)]
        self._alone: dict[Question, Answer] = {}
        self.tally = Tally()

    async def run(self, seconds: float) -> None:
        """Ask each question alone, then all of them for so long."""
        for question in self._questions:
            self._alone[question] = (await ask(self._port, question))[0]
        deadline_s = time.monotonic() + seconds
        await asyncio.gather(*(self._client(index, deadline_s) for index in range(self._num_streams)))

    async def _client(self, index: int, deadline_s: float) -> None:
        await asyncio.sleep(index / self._num_streams)  # not all connections in one instant
        while time.monotonic() < deadline_s:
            question = self._questions[index % len(self._questions)]
            index += 1
            try:
                answer, ttft_s = await ask(self._port, question)
            except (OSError, ValueError) as error:
                self.tally.wrong.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
                continue
            self.tally.ttft_s.append(ttft_s)
            self._check(question, answer)

    def _check(self, question: Question, answer: Answer) -> None:
        tally = self.tally
        tally.num_streams += 1
        tally.num_tokens += len(answer.token_ids)
        if not len(answer.token_ids) == answer.num_counted == question.max_tokens:
            tally.wrong.append(
                f"{len(answer.token_ids)} tokens, {answer.num_counted} counted, {question.max_tokens} asked for"
            )
        elif answer.text != self._spelled(question, answer):
            tally.wrong.append(f"the text is not what its tokens spell: {answer.text[-80:]!r}")
        elif answer.token_ids != self._alone[question].token_ids:
            tally.num_unlike_alone += 1

    def _spelled(self, question: Question, answer: Answer) -> str:
        """The text of the ids; the known one is looked up, for decoding takes time from the daemon."""
        alone = self._alone[question]
        return alone.text if answer.token_ids == alone.token_ids else str(self._decode(answer.token_ids))


async def watch(daemon: Daemon, samples: list[dict[str, float]]) -> None:
    """Look at the daemon again and again."""
    began_s = time.monotonic()
    while True:
        samples.append({"at_s": time.monotonic() - began_s, **daemon.sample()})
        await asyncio.sleep(_SAMPLE_S)


# --- what is made of it


def quantile_of(exposition: str, name: str, quantile: float) -> float | None:
    """An upper bound of a quantile, from a Prometheus histogram."""
    rows = re.findall(rf'^{name}_bucket\{{(?:[^}}]*,)?le="([^"]+)"[^}}]*\}} (\S+)$', exposition, re.MULTILINE)
    buckets = sorted((float(bound), float(count)) for bound, count in rows)
    if not buckets or not buckets[-1][1]:
        return None
    return next(bound for bound, count in buckets if count >= quantile * buckets[-1][1])


def growth(samples: list[dict[str, float]], warm_s: float) -> float:
    """How much the memory of the last samples is above that after the warm-up, as a share."""
    after = [sample["rss_bytes"] for sample in samples if sample["at_s"] >= warm_s]
    num = max(1, len(after) // 8)
    return statistics.median(after[-num:]) / statistics.median(after[:num]) - 1 if after else 0.0


def problems(figures: dict[str, Any]) -> Iterator[str]:
    """What is not as it must be."""
    if figures["wrong"]:
        yield f"{figures['num_wrong']} streams went wrong"
    if figures["num_unlike_alone"] > MAX_UNLIKE * figures["num_streams"]:
        yield f"{figures['num_unlike_alone']} of {figures['num_streams']} answers are not those given alone"
    if figures["memory_growth"] > MAX_GROWTH:
        yield f"memory grew by {figures['memory_growth']:.1%}"
    if figures["descriptors"]["after"] > figures["descriptors"]["before"] + 2:
        yield f"descriptors: {figures['descriptors']}"
    if (figures["loop_lag_p99_s"] or 0.0) > MAX_LAG_S:
        yield f"the event loop's lag is {figures['loop_lag_p99_s']} s at p99"
    if not figures["is_all_given_back"]:
        yield "the engine's books do not balance"
    if figures["exit_code"]:
        yield f"the daemon ended with {figures['exit_code']}"


async def measure(daemon: Daemon, options: argparse.Namespace, decode: Any) -> dict[str, Any]:
    """The whole run."""
    before = daemon.sample()
    samples: list[dict[str, float]] = []
    clients = Clients(daemon.port, options.streams, options.tokens, decode)
    watching = asyncio.create_task(watch(daemon, samples))
    began_s = time.monotonic()
    await clients.run(60 * options.minutes)
    took_s = time.monotonic() - began_s
    watching.cancel()
    shown = samples[:: max(1, len(samples) // 60)]
    await asyncio.sleep(1.0)  # the last connections are taken down
    after, tally = daemon.sample(), clients.tally
    stats, exposition = daemon.engine_stats(), await asyncio.to_thread(daemon.get, "/metrics")
    ttft_s = sorted(tally.ttft_s) or [0.0]
    return {
        "streams_at_once": options.streams,
        "minutes": round(took_s / 60, 2),
        "num_streams": tally.num_streams,
        "num_tokens": tally.num_tokens,
        "tokens_per_s": round(tally.num_tokens / took_s, 1),
        "num_wrong": len(tally.wrong),
        "wrong": tally.wrong[:10],
        "num_unlike_alone": tally.num_unlike_alone,
        "ttft_p50_s": round(ttft_s[len(ttft_s) // 2], 3),
        "ttft_p99_s": round(ttft_s[len(ttft_s) * 99 // 100], 3),
        "loop_lag_p99_s": quantile_of(exposition, "llmd_event_loop_lag_seconds", 0.99),
        "memory_growth": round(growth(samples, min(60.0, 60 * options.minutes / 2)), 4),
        "rss_mb": {"before": before["rss_bytes"] / 1e6, "most": max(s["rss_bytes"] for s in samples) / 1e6},
        "descriptors": {
            "before": before["descriptors"],
            "most": max(sample["descriptors"] for sample in samples),
            "after": after["descriptors"],
        },
        "threads": {"before": before["threads"], "after": after["threads"]},
        "cpu_share": round((after["cpu_s"] - before["cpu_s"]) / took_s, 2),
        "is_all_given_back": stats["num_free_blocks"] == stats["num_blocks"] and stats["admitted"] == stats["finished"],
        "samples": [{name: round(value, 1) for name, value in sample.items()} for sample in shown],
    }


def main() -> int:
    """Run it; 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=64, help="of the longest answers")
    parser.add_argument(
        "--serve-args",
        default="--dtype float32",
        help="more flags for llmd serve; in float32 a token hangs less on how many rows are computed with it",
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    from llmd.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(ROOT / "plugins" / "llmd_plugins" / "sources" / "demo" / "model")
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder), shlex.split(options.serve_args))
        try:
            figures = asyncio.run(measure(daemon, options, tokenizer.decode))
            figures["exit_code"] = daemon.stop()
        finally:
            if daemon.process.poll() is None:
                daemon.process.kill()
        figures["log_has_errors"] = " ERROR " in daemon.log.read_text()
    found = figures["problems"] = list(problems(figures))
    report(figures, options.output, shown=tuple(name for name in figures if name != "samples"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
