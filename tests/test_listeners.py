"""Sockets that are handed down, and UNIX sockets whose files outlive a process."""

import os
import socket
import stat
import subprocess
import sys

import pytest

from llmd.config import Config, ServerConfig
from llmd.errors import CannotListen, ConfigError
from llmd.listeners import Inherited, UnixListener, admin_socket_path, cannot_listen, inherit, peer_user

# --- sockets of a supervisor

PROGRAM = """
import os, socket, sys
listening = [socket.socket(getattr(socket, name)) for name in sys.argv[2].split(",") if name]
for made in listening:
    made.bind("" if made.family == socket.AF_UNIX else ("127.0.0.1", 0))
    made.listen()
numbers = [os.dup(made.fileno()) for made in listening]
for index, number in enumerate(numbers):
    os.dup2(number, 3 + index)
env = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(numbers)), "LISTEN_FDNAMES": sys.argv[1], "OTHER": "1"}
from llmd.listeners import inherit
try:
    found = inherit(env)
    print({name: len(sockets) for name, sockets in found._asdict().items()}, env, os.get_inheritable(3))
except Exception as error:
    print(error)
"""


def adopted(names, families):
    """What a process says that is given such sockets."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, names, families], capture_output=True, text=True, check=True, timeout=60
    )
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("names", "families", "counts"),
    [
        ("api", "AF_INET", (1, 0, 0)),
        ("api:api:metrics:admin", "AF_INET,AF_INET,AF_INET,AF_UNIX", (2, 1, 1)),
        ("llmd.socket", "AF_INET", (1, 0, 0)),
        ("unknown", "AF_INET", (1, 0, 0)),
        ("", "AF_UNIX", (1, 0, 0)),
    ],
)
def test_sockets_are_taken_over_by_name(names, families, counts):
    expected = dict(zip(("api", "admin", "metrics"), counts, strict=True))
    assert adopted(names, families) == f"{expected} {{'OTHER': '1'}} False"


def test_name_that_nobody_knows():
    assert adopted("api:web", "AF_INET,AF_INET") == (
        "a socket is handed down as 'web'; allowed (FileDescriptorName=): api, admin, metrics"
    )


@pytest.mark.parametrize("env", [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_FDS": "1"}])
def test_sockets_of_another_process_are_left_alone(env):
    assert inherit(dict(env)) == Inherited()


@pytest.mark.parametrize("count", ["0", "x", ""])
def test_no_sockets(count):
    assert inherit({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}) == Inherited()


# --- where operators find the daemon


@pytest.mark.parametrize(
    ("given", "env", "path"),
    [
        (None, {}, None),
        (None, {"RUNTIME_DIRECTORY": "/run/llmd"}, "/run/llmd/admin.sock"),
        (None, {"RUNTIME_DIRECTORY": "/run/llmd:/run/other"}, "/run/llmd/admin.sock"),
        ("", {"RUNTIME_DIRECTORY": "/run/llmd"}, None),
        ("/srv/a.sock", {"RUNTIME_DIRECTORY": "/run/llmd"}, "/srv/a.sock"),
    ],
)
def test_admin_socket_path(given, env, path):
    found = admin_socket_path(Config(server=ServerConfig(admin_socket=given)), env)
    assert (None if found is None else str(found)) == path


# --- files of UNIX sockets


def test_permission_is_there_before_anyone_can_connect(tmp_path):
    listener = UnixListener(tmp_path / "a.sock", mode=0o660)
    assert stat.S_IMODE(os.stat(listener.path).st_mode) == 0o660
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(listener.path)
        assert peer_user(client) == f"uid-{os.geteuid()}"
    listener.close()
    assert not os.path.exists(listener.path)


def test_stale_file_is_replaced(tmp_path):
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    listener = UnixListener(path)
    listener.close()


def test_socket_in_use_is_left_alone(tmp_path):
    first = UnixListener(tmp_path / "a.sock")
    with pytest.raises(OSError, match="in use"):
        UnixListener(tmp_path / "a.sock")
    assert os.path.exists(first.path)
    first.close()


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "a.sock").write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        UnixListener(tmp_path / "a.sock")
    assert (tmp_path / "a.sock").read_text() == "precious"


def test_file_of_a_successor_is_left_alone(tmp_path):
    first = UnixListener(tmp_path / "a.sock")
    os.unlink(first.path)
    second = UnixListener(tmp_path / "a.sock")
    first.close()
    assert os.path.exists(second.path)
    second.close()


def test_close_may_come_twice_and_after_the_folder_went(tmp_path):
    (tmp_path / "folder").mkdir()
    listener = UnixListener(tmp_path / "folder" / "a.sock")
    os.unlink(listener.path)
    (tmp_path / "folder").rmdir()
    listener.close()
    listener.close()


# --- errors


@pytest.mark.parametrize(("number", "kind"), [(98, CannotListen), (13, ConfigError)])
def test_only_an_address_in_use_is_worth_another_try(number, kind):
    error = cannot_listen(Config(), "port", "'::', port 1", OSError(number, os.strerror(number)))
    assert isinstance(error, kind)
    assert "server.port: cannot listen on '::', port 1: " in str(error)
