"""From the start of the daemon's process to READY, as systemd is told it: with nothing compiled yet, and again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.host import ROOT
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import write_model

_PATIENCE_S = 65.0


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name; large models start once, with the kernels that other parts have compiled."""
    if "0.5b" not in setting.model:
        return {"again": lambda: start(setting, None)}
    compiled = setting.folder / "triton"
    return {"first": lambda: start(setting, compiled), "again": lambda: start(setting, compiled)}


def start(setting: Setting, triton_cache: Path | None) -> dict[str, Any]:
    """Seconds until READY=1, and what the daemon was doing when it began to do so. Raises RuntimeError if it ends before."""
    folder = setting.folder / "model"
    write_model(folder, setting.model, is_tiny=setting.is_tiny)
    address = str(setting.folder / "notify")
    room = ["--kv-cache-memory-bytes", str(16 << 20)] if setting.is_tiny else []
    command = [
        sys.executable, "-m", "llmd", "serve", str(folder), "--load-format", "dummy", "--dtype", "bfloat16", "--device",
        setting.device.type, "--max-model-len", "128" if setting.is_tiny else "8192", "--port", "0", *room,
    ]  # fmt: skip
    environment = os.environ | {"NOTIFY_SOCKET": address}
    if triton_cache is not None:
        environment["TRITON_CACHE_DIR"] = str(triton_cache)
    Path(address).unlink(missing_ok=True)
    log = setting.folder / "daemon.log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, log.open("wb") as said:
        told.bind(address)
        told.settimeout(0.2)
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        try:
            seen = _until_ready(told, process, begin)
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {log.read_text(errors='replace')[-1500:]}") from None
        finally:
            process.terminate()
            _end(process)
    return seen


def _until_ready(told: socket.socket, process: subprocess.Popen[bytes], begin: float) -> dict[str, Any]:
    first_s = None
    while process.poll() is None and time.perf_counter() - begin < _PATIENCE_S:
        try:
            words = told.recv(4096).decode()
        except TimeoutError:
            continue
        now_s = round(time.perf_counter() - begin, 2)
        first_s = first_s or now_s
        if "READY=1" in words.splitlines():
            return {"ready_s": now_s, "first_word_s": first_s}
    raise RuntimeError(f"not ready after {time.perf_counter() - begin:.0f} s, exit code {process.poll()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
