"""Measuring attention libraries without a GPU: what is measured, told and written."""

import importlib.util

import pytest
import torch
from plugins.attention import library_fakes

from benchmarks.gpu import tables, tune_libraries
from benchmarks.gpu.setting import Setting
from llmd_kernels.paged_attention.libraries import Speed
from llmd_plugins.attention.flash_attn import FlashAttention2
from llmd_plugins.attention.flashinfer import FlashInfer


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A setting on the CPU, with libraries to measure."""
    library_fakes.install(monkeypatch)
    monkeypatch.setattr(tune_libraries, "_LAYERS", 2)
    monkeypatch.setattr(tune_libraries, "_ROUNDS", 1)
    return Setting(torch.device("cpu"), True, "", tmp_path, {})


@pytest.mark.parametrize("library", [FlashAttention2, FlashInfer])
def test_both_kinds_of_steps_are_measured(library, tiny):
    speed = tune_libraries.speed_of(library(), 64, tiny)
    assert speed.prefill > 0
    assert (speed.decode > 0) == library.can_decode


def test_usable_ones_are_measured_and_the_others_told(tiny, monkeypatch):
    seen, told = [], []
    monkeypatch.setattr(
        tune_libraries, "speed_of", lambda library, dim, setting: seen.append(library.name) or Speed(1.5, 0.9)
    )
    monkeypatch.delitem(library_fakes.RELEASES, "flashinfer-python")
    found = dict(tune_libraries.measured(["flash_attn_3", "flashinfer"], tiny, told.append))
    assert found == {("flash_attn_3", "cpu", dim): Speed(1.5, 0.9) for dim in (64, 128, 256)}
    assert told[2:4] == [
        "flash_attn_3, head dim 256 on cpu: decode 1.50, prefill 0.90",
        "flashinfer, head dim 64: not measured: flashinfer-python is not installed",
    ]


def test_the_table_is_written_in_the_style_of_its_file(tmp_path):
    source = tune_libraries.PATH.read_text()
    assert "nothing was measured yet" in source
    entries = {("flashinfer", "sm_90", 128): Speed(0.0, 1.2), ("flash_attn", "sm_80", 64): Speed(1.25, 0.97)}
    new = tables.replaced(source, "_TABLE", tune_libraries.lines(entries))
    here = tmp_path / "libraries_as_written.py"
    here.write_text(new)
    spec = importlib.util.spec_from_file_location(here.stem, here)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert entries == module._TABLE
    assert list(module._TABLE) == sorted(entries)
    assert module.speed("flashinfer", "sm_90", 96) == (0.0, 1.2)
    assert tables.replaced(new, "_TABLE", tune_libraries.lines(entries)) == new


def test_without_a_gpu_nothing_is_measured(capsys):
    with pytest.raises(SystemExit):
        tune_libraries.main(["--dry-run"])
    assert "there is no GPU" in capsys.readouterr().err
