"""The container file and the compose file: what they name is there, and the health check tells alive from dead."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from daemons import Daemon

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "etc" / "container"
FILE = (FOLDER / "Containerfile").read_text()
COMPOSE = yaml.safe_load((FOLDER / "compose.yml").read_text())


def copied():
    """What the build takes from the checkout."""
    lines = re.findall(r"(?m)^COPY (?!--from)(.+)$", FILE)
    return [source for line in lines for source in line.split()[:-1]]


@pytest.mark.parametrize("source", copied())
def test_what_is_copied_is_there_and_let_through(source):
    assert (ROOT / source).exists()
    allowed = (FOLDER / "Containerfile.dockerignore").read_text().splitlines()
    assert f"!{source}" in allowed


def test_everything_in_the_wheel_is_copied():
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {package.partition("/")[0] for package in wheel["packages"]} <= set(copied())


def test_it_does_not_run_as_root():
    last = FILE.rpartition("\nFROM ")[2]
    assert re.findall(r"(?m)^USER (.+)$", last) == ["llmd"]


def test_compose_names_files_that_are_there():
    mounts = [mount.split(":")[0] for service in COMPOSE["services"].values() for mount in service["volumes"]]
    for mount in mounts:
        assert (FOLDER / mount).exists() if mount.startswith(".") else mount in COMPOSE["volumes"]


def test_prometheus_scrapes_what_the_daemon_opens():
    scraped = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]["targets"]
    assert scraped == [f"llmd:{COMPOSE['services']['llmd']['environment']['LLMD_SERVER__METRICS_PORT']}"]


def test_compose_sets_keys_that_there_are():
    """The variables, empty ones too, make a configuration."""
    from llmd.config_load import load_config

    given = COMPOSE["services"]["llmd"]["environment"]
    filled = {name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in given.items()}
    named = {name: value.strip('"') for name, value in re.findall(r"(LLMD_SERVER__\w+)=(\S+)", FILE)}
    server = load_config(env={**named, **filled}).server
    assert (server.host, server.metrics_port, server.api_keys) == ("0.0.0.0", 8001, ())


def test_health_check(tmp_path):
    command = json.loads(re.search(r"(?m)HEALTHCHECK .*\\\n\s+CMD (\[.*\])", FILE)[1])
    with Daemon("serve", "demo", cwd=tmp_path) as running:
        url = running.ready().url

        def check():
            program = command[-1].replace("http://127.0.0.1:8000", url)
            return subprocess.run([sys.executable, *command[1:-1], program], capture_output=True, check=False, timeout=60)

        assert check().returncode == 0
        running.process.kill()
        running.process.wait()
        assert check().returncode != 0
