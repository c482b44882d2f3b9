"""Daemons in processes of their own, with the fake executor unless a test wants the real one."""

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from signal import SIGTERM

from fake_wheels import Wheels

ROOT = Path(__file__).parent.parent

FAKE_EXECUTOR = """
    import asyncio, os
    from llmd.api.v1 import EngineFailure, ExecutorSpec, LoadProgress, hookimpl

    NUMBERS = ("vocab_size", "num_blocks", "max_model_len", "max_num_seqs")

    def build(config, *, path, cache, scheduler, parts):
        from fakes import FakeExecutor, fake_info

        class Executor(FakeExecutor):
            async def start(self, report):
                report(LoadProgress("shard 1/2", 0.25))
                await asyncio.sleep(float(os.environ.get("FAKE_LOAD_S", "0")))
                return await super().start(report)

            def submit(self, plan, masks=None):
                self.num_plans = getattr(self, "num_plans", 0) + 1
                if "FAKE_BREAKS" in os.environ and self.num_plans > 1:  # the first is the warm-up
                    self.fail_next = EngineFailure("the fake device is lost")
                return super().submit(plan, masks)

            async def ping(self):
                await asyncio.sleep(float(os.environ.get("FAKE_PING_S", "0")))
                return 0.0

        numbers = {name: int(os.environ[f"FAKE_{name.upper()}"]) for name in NUMBERS if f"FAKE_{name.upper()}" in os.environ}
        info = fake_info(**{"vocab_size": 4096, "num_blocks": 512, **numbers})
        return Executor(info, step_s=float(os.environ.get("FAKE_STEP_S", "0.001")))

    @hookimpl
    def llmd_register_executors():
        return [ExecutorSpec(name="fake", summary="for tests", build=build)]
"""


# what systemd does between fork and exec: sockets from 3 on, and whom they are for
HAND_DOWN = """
import fcntl, os, sys
moved = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 100) for number in sys.argv[1].split(",")]
for index, number in enumerate(moved):
    os.dup2(number, 3 + index)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(moved)), "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.argv[3], sys.argv[3:])
"""


class Daemon:
    """`llmd` as a child process; leaving the context kills what still runs.

    `sockets` are handed down by name, as systemd does. `preexec` runs in the child before the program.
    """

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        fake: bool = True,
        program: str = "",
        wheel: str = "",
        sockets: Sequence[tuple[str, socket.socket]] = (),
        preexec: Callable[[], None] | None = None,
        stderr: int = subprocess.PIPE,
        **environment: str | None,
    ) -> None:
        wheels = Wheels(cwd / "wheels")
        wheels.folder.mkdir(exist_ok=True)
        wheels.add("acme-fake", FAKE_EXECUTOR)
        if wheel:
            wheels.add("acme-more", wheel)
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLMD_")}
        paths = [str(wheels.folder), str(ROOT / "tests"), env.get("PYTHONPATH", "")]
        env |= {"PYTHONPATH": os.pathsep.join(paths), "LLMD_SERVER__PORT": "0"}
        if fake:
            env["LLMD_MODELS__0__EXECUTOR"] = "fake"
        env = {name: value for name, value in (env | environment).items() if value is not None}
        command = [sys.executable, *(("-c", program) if program else ("-m", "llmd", *arguments))]
        numbers = [given.fileno() for _, given in sockets]
        if sockets:
            names = ":".join(name for name, _ in sockets)
            command = [sys.executable, "-c", HAND_DOWN, ",".join(map(str, numbers)), names, *command]
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            command, cwd=cwd, env=env, stderr=stderr, text=True, pass_fds=numbers, preexec_fn=preexec
        )
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        if self.process.stderr is not None:
            self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self._reader.join(5)
            self.process.stderr.close()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify_all()

    @property
    def log(self) -> str:
        """All of stderr so far."""
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = 60.0, *, after: int = 0) -> re.Match:
        """The first line of the log, from line `after` on, that matches."""
        deadline = time.monotonic() + timeout_s
        with self._more:
            while True:
                for line in self.lines[after:]:
                    if match := re.search(pattern, line):
                        return match
                left_s = deadline - time.monotonic()
                ended = self.process.poll() is not None and not self._reader.is_alive()
                assert left_s > 0, f"{pattern!r} is not in the log:\n{self.log}"
                assert not ended, f"the process ended with {self.process.returncode}:\n{self.log}"
                self._more.wait(min(left_s, 0.2))

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.wait_for(r'listens on ([^\s"]+)')[1]

    def ready(self):
        """Wait until it is ready; itself."""
        self.wait_for("ready after")
        return self

    def get(self, path: str, body=None, **headers):
        """(status, JSON or text) of a request; an HTTP error is an answer too."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, _read_body(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _read_body(error)

    def admin(self, path: str, body=None):
        """(status, JSON or text) of a request over the admin socket, where the test has set one."""
        return unix_request(self.wait_for(r"admin routes at unix:(\S+)")[1], path, body)

    def complete(self, prompt="hello", **fields):
        """One completion."""
        return self.get("/v1/completions", {"prompt": prompt, "max_tokens": 4, **fields})

    def signal(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def stop(self, number: int = SIGTERM, timeout_s: float = 60.0) -> int:
        """Send a signal and wait; the exit code."""
        self.signal(number)
        return self.process.wait(timeout_s)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def unix_request(socket_path: str, path: str, body=None):
    """(status, JSON or text) of a GET, or of a POST where there is a body."""
    with contextlib.closing(_UnixConnection(socket_path)) as connection:
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"} if data else {}
        connection.request("POST" if data else "GET", path, data, headers)
        answer = connection.getresponse()
        return answer.status, _read_body(answer)


def _read_body(answer):
    text = answer.read().decode()
    return json.loads(text) if "json" in answer.headers.get("Content-Type", "") else text


class NotifySocket:
    """What systemd would hear."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(0.2)
        self.heard: list[dict[str, str]] = []

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def listen(self, seconds: float = 0.0) -> list[dict[str, str]]:
        """Everything said so far and within the next seconds."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                text = self._socket.recv(4096).decode()
                self.heard.append(dict(line.partition("=")[::2] for line in text.splitlines()))
            except TimeoutError:
                if time.monotonic() >= deadline:
                    return self.heard
