"""The command: its flags, and llmd alone from end to end on a model of two small layers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cpu import peers
from benchmarks.cpu.engine_list import ENGINES

SCRIPT = peers.__file__


def parse(*flags):
    return peers.arguments().parse_args(["--models", "m", *flags])


def test_lists_are_checked(capsys):
    assert parse("--formats", "int8,int4").formats == ["int8", "int4"]
    with pytest.raises(SystemExit):
        parse("--work", "decode,sleep")
    assert "sleep is none of start, decode" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--engine", "ollama=/bin/python")
    assert "'ollama=/bin/python' is not ENGINE=PYTHON" in capsys.readouterr().err


def test_engines_take_part_in_the_formats_they_have():
    plan = peers.make_plan(parse("--formats", "bf16,int8"), list(ENGINES), 1000)
    assert plan.engines["bf16"] == list(ENGINES)
    assert plan.engines["int8"] == ["llmd", "llmd-fresh", "llama.cpp", "openvino"]
    plan = peers.make_plan(parse("--http-formats", "int4"), list(ENGINES), 1000)
    assert [name for name in plan.engines if "llmd-http" in plan.engines[name]] == ["int4"]


def test_files_are_read_whole_or_by_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    (tmp_path / "sub").mkdir()
    peers.read_through(str(tmp_path / "file"))
    peers.read_through(str(tmp_path))


def test_an_interpreter_without_its_engine_ends_the_command(tmp_path):
    command = [sys.executable, SCRIPT, "--models", str(tmp_path), "--engine", f"llama.cpp={tmp_path}/python"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"--engine llama.cpp: {tmp_path}/python has no module llama_cpp" in done.stderr


@pytest.mark.timeout(120)
def test_llmd_alone_from_end_to_end(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, SCRIPT, "--tiny", "--models", str(tmp_path), "--output", str(output), "--formats", "bf16"]
    flags = ["--work", "start,decode,many16", "--without", "transformers,llmd-fresh", "--rounds", "1", "--quiet-wait-s", "0"]
    environment = os.environ | {"CXX": "no-compiler", "LLMD_CACHE_DIR": str(tmp_path)}  # kernels are not built for this
    done = subprocess.run([*command, *flags, "--threads", "1"], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    written = json.loads(Path(output).read_text())
    assert written["failures"] == {}
    assert written["left_out"]["transformers"] == "not wanted"
    bf16 = written["formats"]["bf16"]
    assert set(bf16) == {"weight_bytes", "start", "decode", "many16", "memory"}
    assert bf16["decode"]["engines"]["llmd"]["median"] > 1
    assert 0 < bf16["start"]["engines"]["llmd"]["median"] < 100
    assert bf16["memory"]["engines"]["llmd"]["median"] > 10 << 20
    assert "decode" in done.stdout
