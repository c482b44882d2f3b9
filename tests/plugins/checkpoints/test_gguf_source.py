"""Where GGUF files come from: paths, folders, and a small hub of our own."""

import json
import os
import subprocess
import sys

import fake_hub
import gguf_files
import pytest
from model.tiny_models import make_model

from llmd.cli import run
from llmd.config import ModelConfig
from llmd.errors import ModelError
from llmd_plugins.checkpoints.gguf import llmd_register_model_sources
from llmd_plugins.checkpoints.gguf.folder import find_file

PROGRAM = """
import json, sys
from llmd.config import ModelConfig
from llmd.errors import ModelError
from llmd_plugins.checkpoints.gguf.folder import resolve

for name in json.loads(sys.argv[1]):
    try:
        print(sorted(path.name for path in resolve(ModelConfig(model=name), print).iterdir()))
    except ModelError as error:
        print(error)
"""


@pytest.fixture
def file(tmp_path):
    model = make_model("Llama", hidden_size=64, head_dim=16, num_attention_heads=4, num_hidden_layers=1)
    gguf_files.write_model(model, tmp_path / "tiny.gguf", "F16")
    return tmp_path / "tiny.gguf"


def claims(name):
    (spec,) = llmd_register_model_sources()
    return spec.claims(ModelConfig(model=name))


def test_what_is_claimed(file, tmp_path):
    assert claims(str(file))
    assert claims("missing.gguf")
    assert claims("owner/name/some-Q4_K_M.gguf")
    assert claims("owner/name:Q4_K_M")
    assert claims(str(tmp_path))
    assert not claims("owner/name")
    assert not claims("demo")
    (tmp_path / "config.json").write_text("{}")
    assert not claims(str(tmp_path))


def test_files_that_cannot_be_told(file, tmp_path):
    with pytest.raises(ModelError, match=r"'missing.gguf' does not exist"):
        find_file("missing.gguf")
    assert find_file(str(tmp_path)) == file
    (tmp_path / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"must be one .gguf file; the folder holds other.gguf, tiny.gguf"):
        find_file(str(tmp_path))


def test_files_at_the_hub(file, tmp_path, monkeypatch):
    monkeypatch.setitem(fake_hub.FILES, "sub/tiny-Q8_0.gguf", file.read_bytes())
    hub = fake_hub.Hub()
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    names = ["good/model/sub/tiny-Q8_0.gguf", "good/model:q8_0", "good/model:Q4_K_M", "unknown/model:Q8_0"]
    command = [sys.executable, "-c", PROGRAM, json.dumps(names)]
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = "['config.json', 'generation_config.json', 'tiny-Q8_0.gguf', 'tokenizer.json', 'tokenizer_config.json']"
    assert lines[:2] == [wanted, wanted]
    assert "holds no such .gguf file" in lines[2]
    assert "cannot be fetched from the hub" in lines[3]
    hub.close()
    command[-1] = json.dumps(names[:2])
    lines = subprocess.run(command, env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True).stdout
    assert lines.splitlines() == [wanted, wanted]


def test_check_tells_what_is_wrong_with_a_file(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    codes = []
    (tmp_path / "llmd.toml").write_text(f'[[models]]\nmodel = "{file}"\n')
    arguments = ["check", "--config", str(tmp_path / "llmd.toml")]
    run(arguments, fail=codes.append)
    assert codes in ([], [0]), capsys.readouterr()
    file.write_bytes(file.read_bytes()[:5000])
    run(arguments, fail=codes.append)
    assert codes[-1] == 78
    out = capsys.readouterr()
    assert "tiny.gguf is truncated" in out.out + out.err
