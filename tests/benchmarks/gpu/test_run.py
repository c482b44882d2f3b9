"""The command without a GPU: tiny shapes on a CPU, its budget, crashes, and missing wheels."""

import argparse
import gzip
import json
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.profiler_util import DeviceType

from benchmarks.gpu import host, run, serve, shapes, table, trace
from benchmarks.gpu.host import ROOT
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.setting import Setting


def test_the_command_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu/run.py"), "--dry-run-cpu", "--output", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "kernels", "decode qwen2.5-0.5b", "serve"],
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    by_case = {(line["part"], line["case"]): line["figures"] for line in found["results"]}
    assert by_case["ceilings", "copy"]["copy_gb_s"] > 0
    assert by_case["kernels", "embedding"].keys() >= {"ms", "gb_s", "of_copy", "times_torch"}
    assert by_case["kernels", "prefill 7B, 8k"]["tflop_s"] >= 0
    assert by_case["decode qwen2.5-0.5b", "decode 3"].keys() == {"tokens_s", "ms", "cpu_ms", "MBU", "MFU"}
    assert by_case["decode qwen2.5-0.5b", "prefill 8k"]["tokens_s"] > 0
    assert by_case["serve qwen2.5-0.5b", "requests"]["output_tokens"] > 0
    assert (tmp_path / "gpu.md").read_text().count("\n") == len(by_case) + 2
    assert "| kernels | embedding | ms " in done.stdout


def given(tmp_path, **fields):
    return argparse.Namespace(**{"output": tmp_path, "budget": 100.0, "dry_run_cpu": False} | fields)


PART = Part("part", "none", "", 50, 10, True)


def test_a_crash_loses_one_case_and_the_next_process_goes_on_behind_it(tmp_path, monkeypatch):
    work = run.Run(given(tmp_path), {})
    runs = []

    def process(part, done, seconds):
        runs.append(list(done))
        if not done:
            return [{"case": "a"}, {"case": "a", "figures": {"copy_gb_s": 5.0}}, {"case": "b"}], "ended with -11"
        return [{"case": "c"}, {"case": "c", "error": "ValueError: bad"}], None

    monkeypatch.setattr(work, "_process", process)
    work.part(PART)
    assert runs == [[], ["a", "b"]]
    assert [(line["case"], line.get("error")) for line in work.results] == [
        ("a", None),
        ("b", "ended with -11"),
        ("c", "ValueError: bad"),
    ]
    assert work._ceilings == {"copy_gb_s": 5.0}


def test_a_device_that_is_lost_costs_no_case_twice(tmp_path, monkeypatch):
    work, runs = run.Run(given(tmp_path), {}), []

    def process(part, done, seconds):
        runs.append(list(done))
        return ([{"case": "a"}, {"case": "a", "error": "lost"}], "ended with 1") if not done else ([], None)

    monkeypatch.setattr(work, "_process", process)
    work.part(PART)
    assert runs == [[], ["a"]]


def test_a_part_that_cannot_begin_is_an_error(tmp_path, monkeypatch):
    work = run.Run(given(tmp_path), {})
    monkeypatch.setattr(work, "_process", lambda part, done, seconds: ([], "ended with 1: no module"))
    work.part(PART)
    assert work.results == [{"part": "part", "case": "all", "error": "ended with 1: no module"}]


def test_a_real_worker_that_is_killed_by_its_limit(tmp_path):
    work = run.Run(given(tmp_path, budget=1e9), dict(host.prepare(tmp_path / "site", None)[0]))
    lines, ended = work._process(PARTS[0], [], 0.05)
    assert lines == []
    assert ended.startswith("not done after")


def test_parts_behind_the_budget_are_dropped(tmp_path, monkeypatch):
    work = run.Run(given(tmp_path, budget=12.0), {})
    monkeypatch.setattr(work, "_process", lambda *_: pytest.fail("no process may begin"))
    work.part(PART)
    assert work.results[0]["dropped"].endswith("s were left")
    assert "dropped: " in table.render(work.results)


def test_limits_fit_the_budget_in_the_order_of_worth():
    assert sum(part.least_s for part in PARTS) < run.parse([]).budget < 540
    assert [part.name for part in run.chosen(run.parse(["--only", "serve"]))] == ["ceilings", "serve qwen2.5-0.5b"]
    assert len(run.chosen(run.parse(["--quick"]))) < len(run.chosen(run.parse([]))) == len(PARTS)


def test_an_unknown_part_is_told(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--only", "zeta"])
    assert "no part begins with 'zeta'; there are: ceilings" in capsys.readouterr().err


def test_missing_wheels_are_unpacked_and_present_ones_are_not(tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("acme_zeta-1.0-py3-none-any.whl", "pytest-0.1-py3-none-any.whl"):
        with zipfile.ZipFile(wheels / name, "w") as archive:
            archive.writestr(f"{name.partition('-')[0]}.py", "value = 3\n")
    monkeypatch.setattr(host, "_has", lambda name: name == "pytest")
    environment, unpacked = host.prepare(tmp_path / "site", wheels)
    assert unpacked == ["acme_zeta-1.0-py3-none-any.whl"]
    assert (tmp_path / "site" / "acme_zeta.py").exists()
    assert str(tmp_path / "site") in environment["PYTHONPATH"]
    points = (tmp_path / "site" / "llmd-0.dist-info" / "entry_points.txt").read_text()
    assert "[llmd.plugins]\n" in points
    assert "sampling.triton = llmd_plugins.sampling.triton" in points


def test_plugins_are_found_from_the_written_entry_points(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_has", lambda name: False)
    host.prepare(tmp_path / "site", None)
    script = (
        "from importlib.metadata import PathDistribution; from pathlib import Path; import sys;"
        "points = PathDistribution(Path(sys.argv[1])).entry_points; print(len(points.select(group='llmd.plugins')))"
    )
    folder = tmp_path / "site" / "llmd-0.dist-info"
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) > 50


def test_lengths_are_like_those_of_conversations():
    lengths = serve.lengths(256, 1024)
    assert lengths == serve.lengths(256, 1024)
    prompts, answers = (sorted(column) for column in zip(*lengths, strict=True))
    assert 80 < prompts[128] < 150
    assert 130 < answers[128] < 220
    assert max(prompts[-1], answers[-1]) <= 512


def test_the_shapes_are_the_models():
    sizes = {}
    for name in shapes.MODELS:
        c = shapes.shape(name, is_tiny=False)
        head = c["hidden_size"] // c["num_attention_heads"]
        layer = c["hidden_size"] * (2 * c["hidden_size"] + 2 * head * c["num_key_value_heads"] + 3 * c["intermediate_size"])
        tables_of = 1 if c["tie_word_embeddings"] else 2
        sizes[name] = layer * c["num_hidden_layers"] + tables_of * c["vocab_size"] * c["hidden_size"]
    assert sizes["qwen2.5-0.5b"] == pytest.approx(0.494e9, rel=0.01)
    assert sizes["qwen2.5-7b"] == pytest.approx(7.62e9, rel=0.01)
    assert sizes["llama-3-8b"] == pytest.approx(8.03e9, rel=0.01)


def test_a_trace_of_decode_steps(tmp_path):
    setting = Setting(torch.device("cpu"), True, "qwen2.5-0.5b", tmp_path, {})
    (work,) = trace.cases(setting).values()
    assert work() == {"steps": 6, "file": "trace.json.gz"}
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert len(events) > 100


def test_what_a_trace_says_of_the_device():
    def event(name, start, end, kind=DeviceType.CUDA):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=False)

    events = [
        event("a", 10, 20),
        event("b", 15, 30),
        event("cudaStreamSynchronize", 0, 50, DeviceType.CPU),
        event("c", 40, 50),
    ]
    found = trace.device_use(SimpleNamespace(events=lambda: events))
    assert found == {"idle": 0.25, "kernels_a_step": 0.5, "waits": 1}
    assert trace.device_use(SimpleNamespace(events=list))["idle"] is None
