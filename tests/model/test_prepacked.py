"""Packed weights kept on disk: found again, made again when anything changed or broke, and never in anybody's way."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from model.step_driver import StepDriver, make_runner, model_parts
from model.tiny_models import make_model, prompts, save_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmd.config import ModelConfig
from llmd.model import prepacked, prepacked_files
from llmd.model.prepacked_files import SUFFIX, cache_folder, entry_of, make_room
from llmd_kernels import native

METHODS = ("int8", "int4", "nf4", "fp8")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(make_model("Llama", tie_word_embeddings=True).bfloat16(), tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of one's own, but for the compiled kernels."""
    kernels = native._cache_folder()
    monkeypatch.setenv("LLMD_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(kernels)
    monkeypatch.setattr(prepacked, "_WORTHWHILE_BYTES", 0)
    monkeypatch.setattr(prepacked, "_QUIET_S", 0.0)
    return tmp_path / "cache" / "prepacked"


def load(path, quantization="int8", **model):
    """A runner, once what it keeps is written."""
    runner = make_runner(path, dtype="bfloat16", quantization=quantization, **{"prepacked_cache": True, **model})
    for thread in threading.enumerate():
        if thread.name == "llmd-prepack":
            thread.join()
    return runner


def tensors_of(runner):
    module = runner.model.module
    return dict(module.named_parameters()) | dict(module.named_buffers())


def generated(runner):
    driver = StepDriver(runner)
    sequence = driver.sequence(prompts(12)[0])
    driver.generate([sequence], 6)
    return sequence.tokens, driver.logits[sequence.row]


def packings(caplog):
    """How often weights were restored and how often the file was of no use."""
    lines = [record.getMessage() for record in caplog.records]
    return sum("layers were prepacked" in line for line in lines), sum("are of no use" in line for line in lines)


@pytest.mark.parametrize("name", METHODS)
def test_the_second_start_finds_every_bit(saved, cache, name, caplog):
    caplog.set_level("INFO", "llmd.model")
    first = load(saved, name)
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    second = load(saved, name)
    assert packings(caplog) == (1, 0)
    before, after = tensors_of(first), tensors_of(second)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    (tokens, logits), (other_tokens, other_logits) = generated(first), generated(second)
    assert tokens == other_tokens
    assert torch.equal(torch.stack(logits), torch.stack(other_logits))
    assert first.info.weights_bytes == second.info.weights_bytes


def test_it_is_a_safetensors_file(saved, cache):
    load(saved)
    (file,) = cache.iterdir()
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
        told = json.loads(opened.metadata()["llmd"])
        assert "model.layers.0.mlp.down_proj parameter .weight" in names
        assert torch.is_tensor(opened.get_tensor(names[0]))
    assert all(set(layer) == {"facts", "sums"} for layer in told.values())


def test_a_checkpoint_that_is_whole_needs_no_cache(saved, cache):
    load(saved, None)
    assert not cache.exists()


def test_the_opt_out_and_small_models(saved, cache, monkeypatch):
    load(saved, prepacked_cache=False)
    monkeypatch.setattr(prepacked, "_WORTHWHILE_BYTES", 1 << 30)
    load(saved)
    assert not cache.exists()


def entry(path, **model):
    return entry_of(ModelConfig(model=str(path), device="cpu", **model), path, model_parts())


def test_what_a_file_is_known_by(saved, tmp_path, monkeypatch):
    plain = entry(saved, quantization="int4")
    assert plain == entry(saved, quantization="int4")
    others = [
        entry(saved, quantization="int8"),
        entry(saved, quantization="int4", quantization_options={"group_size": 64}),
        entry(saved, quantization="int4", dtype="float32"),
        entry(saved, quantization="int4", hf_overrides={"rope_theta": 5.0}),
        entry_of(ModelConfig(model=str(saved), quantization="int4"), saved, model_parts(), 1, 2),
    ]
    monkeypatch.setattr(prepacked_files, "_machine", lambda: ("another",))
    others.append(entry(saved, quantization="int4"))
    assert len({plain, *others}) == len(others) + 1
    assert entry(saved, quantization="int4", merge_adapter="adapter") is None
    assert entry(tmp_path) is None


def test_weights_that_were_copied_over_the_old_ones_are_not_taken_for_them(saved, tmp_path, caplog):
    """Same names, sizes, header and times."""
    caplog.set_level("INFO", "llmd.model")
    model = save_model(make_model("Llama", tie_word_embeddings=True).bfloat16(), tmp_path / "model")
    file = model / "model.safetensors"
    load(model)
    times = file.stat()
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    load(model)
    assert packings(caplog) == (0, 0)


def damage(file, kind):
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if kind == "bit":
        data[-5] ^= 4
    elif kind == "zeros":
        data[8 + length + 1000 :] = bytes(len(data) - 1008 - length)
    elif kind == "truncated":
        del data[-4096:]
    elif kind == "header":
        data[8:40] = b"{" * 32
    elif kind == "metadata":
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"] = {}
        text = json.dumps(header).encode()
        data = bytearray(len(text).to_bytes(8, "little") + text + data[8 + length :])
    else:
        data = bytearray(kind.encode())
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["bit", "zeros", "truncated", "header", "metadata", "", "no weights at all"])
def test_a_damaged_file_is_told_once_and_made_again(saved, cache, kind, caplog):
    caplog.set_level("INFO", "llmd.model")
    wanted = generated(load(saved))[0]
    (file,) = cache.iterdir()
    damage(file, kind)
    assert generated(load(saved))[0] == wanted
    assert packings(caplog) == (0, 1)
    assert generated(load(saved))[0] == wanted
    assert packings(caplog) == (1, 1)


def test_a_file_that_others_can_write_is_not_believed(saved, cache, caplog):
    caplog.set_level("INFO", "llmd.model")
    load(saved)
    (file,) = cache.iterdir()
    file.chmod(0o622)
    load(saved)
    assert packings(caplog) == (0, 0)


@pytest.mark.parametrize("how", ["a file in the way", "open to others", "no room on the disk", "too large"])
def test_a_folder_that_cannot_be_written_is_a_line_in_the_log(saved, cache, how, monkeypatch, caplog):
    caplog.set_level("INFO", "llmd.model")
    bound = 1 << 30
    if how == "a file in the way":
        cache.write_text("")
    elif how == "open to others":
        cache.mkdir()
        cache.chmod(0o777)
    elif how == "no room on the disk":
        monkeypatch.setattr(prepacked_files, "_SPARE_BYTES", 1 << 60)
    else:
        bound = 1000
    assert len(generated(load(saved, prepacked_cache_bytes=bound))[0]) == 18
    assert sum("prepacked weights are not kept" in record.getMessage() for record in caplog.records) == 1


def test_a_disk_that_fills_up_midway_leaves_nothing(saved, cache, monkeypatch, caplog):
    caplog.set_level("INFO", "llmd.model")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepacked.os, "replace", fail)
    load(saved)
    assert "No space left" in caplog.text
    assert list(cache.iterdir()) == []


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    now, folder = time.time(), tmp_path / "held"
    folder.mkdir(mode=0o700)
    for age, name in enumerate(["new", "older", "oldest"]):
        file = folder / f"{name}{SUFFIX}"
        file.write_bytes(bytes(1000))
        os.utime(file, (now - age, now - age))
    stale, fresh = folder / "stale.tmp", folder / "fresh.tmp"
    for file in (stale, fresh):
        file.touch()
    os.utime(stale, (now - 9999, now - 9999))
    assert make_room(folder, 1500, 3600) is None
    assert sorted(file.name for file in folder.iterdir()) == ["fresh.tmp", f"new{SUFFIX}", f"older{SUFFIX}"]
    assert make_room(folder, 2500, 3600) is None
    assert sorted(file.name for file in folder.iterdir()) == ["fresh.tmp", f"new{SUFFIX}"]
    assert "prepacked_cache_bytes allows 3600" in make_room(folder, 4000, 3600)


def test_use_makes_a_file_young(saved, cache):
    load(saved)
    (file,) = cache.iterdir()
    os.utime(file, (1, 1))
    load(saved)
    assert file.stat().st_mtime > 1


def test_the_folder_is_where_compiled_kernels_are(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "llmd" / "prepacked"


PROCESS = """
import sys, threading
from pathlib import Path
from llmd.model import prepacked
prepacked._WORTHWHILE_BYTES, prepacked._QUIET_S = 0, 0.0
from model.step_driver import StepDriver, make_runner
from model.tiny_models import prompts
runner = make_runner(Path(sys.argv[1]), dtype="bfloat16", quantization="int8", prepacked_cache=True)
driver = StepDriver(runner)
sequence = driver.sequence(prompts(12)[0])
driver.generate([sequence], 6)
print(sequence.tokens)
"""


def test_two_processes_at_once(saved, cache, request, caplog):
    """Neither sees the other's half; what is left is whole."""
    caplog.set_level("INFO", "llmd.model")
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROCESS, str(saved)]
    folder = request.config.rootpath / "tests"
    running = [subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=120)[0] for process in running}
    assert len(answers) == 1
    assert [file.suffix for file in cache.iterdir()] == [SUFFIX]
    assert str(generated(load(saved))[0]) == answers.pop().strip()
    assert packings(caplog) == (1, 0)
