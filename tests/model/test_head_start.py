"""What begins before torch is there, and what does not."""

import subprocess
import sys

import pytest
from model.step_driver import model_parts

from llmd.config import ModelConfig
from llmd.model import head_start


@pytest.fixture
def prepared(monkeypatch):
    asked = []
    monkeypatch.setattr(head_start.huge_pages, "prepare", asked.append)
    monkeypatch.setattr(head_start, "_read_ahead", lambda paths: None)
    monkeypatch.setattr(head_start, "GPU_FILES", ())
    return asked


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMD_CACHE_DIR", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    for name in ("a", "b"):
        (model / f"{name}.safetensors").write_bytes(bytes(6400))
    return model


def begin(folder, **model):
    head_start.head_start(ModelConfig(model=str(folder), **model), folder, model_parts())


def test_memory_for_the_files_or_for_some_of_it(folder, prepared):
    begin(folder)
    begin(folder, quantization="int8")
    assert prepared == [13000, 2600]


def test_memory_for_what_is_kept(folder, prepared):
    config = ModelConfig(model=str(folder), quantization="int8")
    entry = head_start.entry_of(config, folder, model_parts())
    entry.parent.mkdir(parents=True)
    entry.write_bytes(bytes(640))
    head_start.head_start(config, folder, model_parts())
    assert prepared == [650]


def test_none_for_a_gpu_or_without_files(folder, prepared, tmp_path, monkeypatch):
    begin(folder, device="cuda")
    begin(tmp_path / "cache")
    monkeypatch.setattr(head_start, "GPU_FILES", (str(folder),))
    begin(folder)
    assert prepared == []


@pytest.mark.parametrize(
    ("free_bytes", "load_format", "names"),
    [(1 << 30, "auto", ["a.safetensors", "b.safetensors"]), (20000, "auto", []), (1 << 30, "dummy", [])],
)
def test_files_for_a_gpu_are_read_ahead_where_memory_holds_them(
    folder, prepared, monkeypatch, free_bytes, load_format, names
):
    read = []
    monkeypatch.setattr(head_start, "_in_thread", read.extend)
    monkeypatch.setattr(head_start, "free_memory", lambda: free_bytes)
    begin(folder, device="cuda", load_format=load_format)
    assert [path.name for path in read] == names
    assert prepared == []


def test_it_loads_no_torch():
    program = "import sys, llmd.model.head_start; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
