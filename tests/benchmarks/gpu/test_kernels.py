"""Every kernel has a case, and every case's way to it is walked on a CUDA device that computes nothing."""

import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from gpu.fake_gpu import fake_gpu

from benchmarks.gpu import kernels, lora_kernels
from benchmarks.gpu.host import ROOT
from benchmarks.gpu.setting import Setting, median_ms
from benchmarks.gpu.shapes import shape

pytest.importorskip("triton")
MODEL = "qwen2.5-7b"


@pytest.fixture(scope="module")
def launched():
    """The modules whose Triton kernels each case launches, and what is wrong with a case."""
    from triton.runtime.jit import JITFunction

    with fake_gpu() as device:
        launch, modules = JITFunction.run, set()

        def run(kernel, *args, **kwargs):
            modules.add(kernel.fn.__module__)
            return launch(kernel, *args, **kwargs)

        with mock.patch.object(JITFunction, "run", run):
            found, wrong = {}, {}
            for case, make in kernels.all_cases()[0].items():
                modules.clear()
                if why := walk(device, make):
                    wrong[case] = why
                found[case] = set(modules)
    return found, wrong


def walk(device, make):
    """Why a case does not run on a GPU; empty if it does."""
    setting = Setting(torch.device("cuda"), True, MODEL, Path(), {"copy_gb_s": 1.0, "matmul_tflop_s": 1.0})
    try:
        work = make(setting, shape(MODEL, is_tiny=True))
        work.ours()  # what is kept between calls is there
        device.clear()
        assert median_ms(setting, work.ours, as_graph=True) == 1.0
        assert set(device.waits) <= {"synchronize"}, device.waits
    except Exception as error:  # noqa: BLE001 - the test tells of all of them
        return f"{type(error).__name__}: {error}"
    return ""


def test_every_case_launches_a_kernel_and_waits_for_nothing(launched):
    found, wrong = launched
    assert wrong == {}
    by_torch = [case for case, modules in found.items() if not modules]
    assert all(case.startswith("linear ") for case in by_torch)  # where its table says so


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in (ROOT / "kernels").glob("llmd_kernels/*/triton.py")))
def test_every_kernel_has_a_case(folder, launched):
    name = f"llmd_kernels.{folder}.triton"
    importlib.import_module(name)
    loaded = {other: module for other, module in list(sys.modules.items()) if other.endswith(".triton")}

    def uses(module):  # what others build upon is measured with them
        return any(getattr(value, "__module__", "") == name for value in vars(module).values())

    users = {other for other, module in loaded.items() if uses(module)}
    measured = set().union(*launched[0].values())
    assert {name, *users} & measured, f"{folder} has no case in benchmarks/gpu: add one to a *_kernels.py there"


def test_compiling_beforehand_tells_what_is_wrong(tmp_path):
    setting = Setting(torch.device("cpu"), True, MODEL, tmp_path, {})
    assert next(iter(kernels.cases(setting._replace(device=torch.device("cuda"))))) == "compile"
    assert "compile" not in kernels.cases(setting)
    assert kernels.call_once(setting, "embedding") == ""
    assert kernels.call_once(setting, "zeta") == "zeta: KeyError: 'zeta'"
    found = kernels.compile_all(setting, ["embedding", "zeta"])
    assert found == {"cases": 2, "wrong": 1, "first": "zeta: KeyError: 'zeta'"}


def test_a_module_that_cannot_be_imported_costs_its_own_cases_alone(monkeypatch, tmp_path):
    def broken(name):
        if name.endswith("lora_kernels"):
            raise ImportError("no such name")
        return importlib.import_module(name)

    monkeypatch.setattr(kernels, "import_module", broken)
    cases = kernels.cases(Setting(torch.device("cpu"), True, MODEL, tmp_path, {}))
    assert not set(lora_kernels.MAKE) & set(cases)
    with pytest.raises(ImportError, match="no such name"):
        cases["lora_kernels"]()
    assert cases["embedding"]().keys() == {"ms", "gb_s", "of_copy", "torch_ms", "times_torch"}


@pytest.mark.parametrize("name", kernels.modules())
def test_every_case_runs_on_a_cpu(name, tmp_path):
    setting = Setting(torch.device("cpu"), True, MODEL, tmp_path, {"copy_gb_s": 1.0})
    config = shape(MODEL, is_tiny=True)
    for make in importlib.import_module(f"benchmarks.gpu.{name}").MAKE.values():
        assert json.dumps(kernels.measure(setting, config, make))
