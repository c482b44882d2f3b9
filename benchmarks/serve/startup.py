"""Seconds from process start: `llmd --help` answered, and the demo model ready and answering over HTTP.

    python benchmarks/serve/startup.py [--runs 5] [--output FILE]

Each figure is a whole process as a user starts it; the first run, which compiles kernels and fills caches, is not counted.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import report

PROMPT = {"model": "demo", "prompt": "Hello", "max_tokens": 1}


def help_s() -> float:
    """`llmd --help`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llmd", "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_ready(url: str) -> bool:
    """Whether /ready says 200."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=1) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def serve_s() -> tuple[float, float]:
    """The demo model: seconds until /ready says 200, and until a first token has come."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "llmd", "serve", "demo", "--port", str(port)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not is_ready(url):
            if process.poll() is not None:
                raise SystemExit(f"llmd ended with {process.returncode}")
            time.sleep(0.01)
        ready = time.perf_counter() - began
        body, headers = json.dumps(PROMPT).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers)) as answer:
            answer.read()
        return ready, time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def main() -> None:
    """Run and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    helps, serves = [], []
    for _ in range(options.runs + 1):
        helps.append(help_s())
        serves.append(serve_s())
    figures = {
        "help_s": helps[1:],
        "ready_s": [run[0] for run in serves[1:]],
        "first_token_s": [run[1] for run in serves[1:]],
    }
    report({name: round(statistics.median(values), 3) for name, values in figures.items()}, options.output)


if __name__ == "__main__":
    main()
