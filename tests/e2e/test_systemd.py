"""The units: what systemd itself says of them, and their life in a real systemd user instance."""

import configparser
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from daemons import FAKE_EXECUTOR
from fake_wheels import Wheels

ROOT = Path(__file__).parent.parent.parent
UNITS = sorted((ROOT / "systemd").iterdir())
UNIT = ROOT / "systemd" / "llmd.service"
SYSTEMD = Path("/usr/lib/systemd/systemd")

has_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")


def section(file, name):
    """A section's entries; of what is said twice, the last."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(file)
    return parser[name]


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


# --- what the files say


def test_unit_says_what_the_daemon_keeps():
    service = section(UNIT, "Service")
    assert service["Type"] == "notify-reload"
    assert service["RestartPreventExitStatus"] == "78"
    assert re.fullmatch(r"/usr/bin/env llmd --config \S+", service["ExecStart"])
    assert service["ExecStartPre"] == service["ExecStart"].replace("llmd --", "llmd check --")
    assert f"ExecReload={service['ExecStartPre']}\n" in UNIT.read_text()


def test_systemd_waits_longer_than_a_drain_takes():
    from llmd.config import ServerConfig

    assert int(section(UNIT, "Service")["TimeoutStopSec"]) > ServerConfig().drain_timeout_s + 10


def test_socket_units_have_the_names_that_the_daemon_knows():
    from llmd.listeners import KINDS

    units = [section(file, "Socket") for file in UNITS if file.suffix == ".socket"]
    assert {unit["FileDescriptorName"] for unit in units} == set(KINDS)
    assert {unit["Service"] for unit in units} == {"llmd.service"}


@has_analyze
@pytest.mark.parametrize("unit", UNITS, ids=lambda file: file.name)
def test_unit_is_valid(unit):
    ran = run("systemd-analyze", "verify", str(unit))
    # before 253: the second Type= line is ignored, as is meant
    said = [line for line in ran.stderr.splitlines() if "Failed to parse service type, ignoring: notify-reload" not in line]
    assert (ran.returncode, said) == (0, [])


@has_analyze
def test_unit_is_hardened():
    ran = run("systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", str(UNIT))
    assert ran.returncode == 0, ran.stdout


# --- a real instance

HARDENING = "# --- who it is and what it may do"


class Instance:
    """A systemd user instance in a mount namespace of its own, as root: it wants to see that systemd runs the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = folder / "run"
        self.home = folder / "home"
        self.units = self.home / ".config" / "systemd" / "user"
        booted = folder / "booted"
        for made in (self.runtime, self.units, booted / "system"):
            made.mkdir(parents=True)
        self.runtime.chmod(0o700)
        self.env = {
            "PATH": os.environ["PATH"], "HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.runtime), "LANG": "C.UTF-8",
        }  # fmt: skip
        script = f"mount --bind {booted} /run/systemd && exec {SYSTEMD} --user --unit=basic.target"
        self.process = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script], env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def is_up(self) -> bool:
        """Whether it answers within some seconds."""
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and self.process.poll() is None:
            if (self.runtime / "systemd" / "private").exists() and self.ctl("list-units").returncode == 0:
                return True
            time.sleep(0.1)
        return False

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess:
        """systemctl."""
        return run("systemctl", "--user", *arguments, env=self.env)

    def show(self, name: str) -> str:
        """A property of the service."""
        return self.ctl("show", "-P", name, "llmd.service").stdout.strip()

    def stop(self) -> None:
        """End all of it."""
        if self.process.poll() is None:
            self.ctl("stop", "llmd.service", "llmd.socket")
            self.process.send_signal(signal.SIGRTMIN + 14)  # exit at once
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def instance(tmp_path_factory):
    """A running user instance, or a skip that says why there is none."""
    if not SYSTEMD.exists() or shutil.which("systemctl") is None or shutil.which("unshare") is None:
        pytest.skip("there is no systemd, or no unshare")
    if os.geteuid() != 0:
        pytest.skip("a user instance of one's own needs a mount namespace, and that root")
    made = Instance(tmp_path_factory.mktemp("systemd"))
    try:
        if not made.is_up():
            pytest.skip("a systemd user instance does not come up here")
        yield made
    finally:
        made.stop()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def unit(instance):
    """The committed units, with this checkout's program and without what only a system instance can do."""
    folder, port = instance.folder, free_port()
    config = folder / "llmd.toml"
    config.write_text("[server]\napi_keys = ['one']\n")
    wheels = Wheels(folder / "wheels")
    wheels.folder.mkdir()
    wheels.add("acme-fake", FAKE_EXECUTOR)
    text = UNIT.read_text().partition(HARDENING)[0]
    text = text.replace("/usr/bin/env llmd", f"{sys.executable} -m llmd").replace("/etc/llmd/llmd.toml", str(config))
    text = text.replace("RestartSec=2", "RestartSec=0")
    text = re.sub(r"(?m)^(OOMScoreAdjust|LimitMEMLOCK|LoadCredential).*\n", "", text)  # a user instance may not, or cannot
    paths = os.pathsep.join([str(wheels.folder), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = f"PYTHONPATH={paths} LLMD_MODELS__0__EXECUTOR=fake FAKE_STEP_S=0.01 OMP_NUM_THREADS=1"
    own = f"Environment={environment}\nStandardError=append:{folder}/log\n"
    (instance.units / "llmd.service").write_text(f"{text}\n{own}")
    text = (ROOT / "systemd" / "llmd.socket").read_text()
    (instance.units / "llmd.socket").write_text(text.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    instance.ctl("daemon-reload")
    instance.port, instance.config, instance.log = port, config, folder / "log"
    return instance


def complete(port, key="one", max_tokens=4):
    body = json.dumps({"prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["usage"]["completion_tokens"]


def test_life_of_the_service(unit):
    """One test, for a start takes seconds: activation, ready, reload, restart without loss, kill -9, stop."""
    assert unit.ctl("start", "llmd.socket").returncode == 0
    assert unit.ctl("start", "llmd.service").returncode == 0, unit.log.read_text()  # returns when it is ready
    assert unit.ctl("stop", "llmd.service").returncode == 0
    assert complete(unit.port) == 4  # the first connection starts the daemon, and is answered by it
    assert unit.ctl("start", "llmd.service").returncode == 0  # returns when it is ready
    assert unit.show("ActiveState") == "active"
    assert re.fullmatch(r"\d+ running, \d+ waiting, \d+ tok/s", unit.show("StatusText"))

    assert (unit.runtime / "llmd" / "admin.sock").stat().st_mode & 0o777 == 0o600
    _reloads(unit)
    _restarts_without_loss(unit)

    before = unit.show("MainPID")
    os.kill(int(before), signal.SIGKILL)
    assert complete(unit.port) == 4  # by the next one
    assert unit.show("MainPID") not in ("0", before)
    assert unit.show("NRestarts") == "1"

    assert unit.ctl("stop", "llmd.socket", "llmd.service").returncode == 0
    assert (unit.show("ActiveState"), unit.show("Result")) == ("inactive", "success")
    assert unit.show("ExecMainStatus") == "0"


def _reloads(unit):
    good = unit.config.read_text()
    unit.config.write_text(good + "[log]\nlevel = 'debug'\n")
    assert unit.ctl("reload", "llmd.service").returncode == 0
    unit.config.write_text("[server\n")
    assert unit.ctl("reload", "llmd.service").returncode != 0
    assert complete(unit.port) == 4
    unit.config.write_text(good)


def _restarts_without_loss(unit):
    """Clients that come all the time, and whose answers take longer than the gap between them."""
    stop, answers = threading.Event(), []

    def client():
        while not stop.is_set():
            try:
                answers.append(complete(unit.port, max_tokens=20))
            except OSError as error:
                answers.append(repr(error))

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    before = unit.show("MainPID")
    assert unit.ctl("restart", "llmd.service").returncode == 0
    assert unit.show("MainPID") != before
    stop.set()
    for thread in threads:
        thread.join(60)
    assert set(answers) == {20}
