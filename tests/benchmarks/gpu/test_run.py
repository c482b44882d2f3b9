"""The command without a GPU: tiny shapes on a CPU, its budget, crashes, and missing wheels."""

import argparse
import json
import subprocess
import sys
import zipfile

import pytest

from benchmarks.gpu import host, run, serve, shapes, table
from benchmarks.gpu.host import ROOT
from benchmarks.gpu.parts import PARTS, Part


def test_the_command_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu/run.py"), "--dry-run-cpu", "--output", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "decode qwen2.5-0.5b"], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    by_case = {(line["part"], line["case"]): line["figures"] for line in found["results"]}
    assert by_case["ceilings", "copy"]["copy_gb_s"] > 0
    assert by_case["ceilings", "host"]["lacking"] is None
    assert by_case["decode qwen2.5-0.5b", "decode 3"].keys() == {"tokens_s", "ms", "launch_ms", "MBU", "MFU"}
    assert by_case["decode qwen2.5-0.5b", "prefill 8k"]["tokens_s"] > 0
    assert len((tmp_path / "gpu.jsonl").read_text().splitlines()) == len(by_case)
    assert "| decode qwen2.5-0.5b | decode 3 | tokens_s " in (tmp_path / "gpu.md").read_text()
    assert done.stdout.endswith(table.figures(found["results"]) + "\n")
    assert " s decode qwen2.5-0.5b, decode 3: tokens_s " in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "gpu.jsonl", "gpu.md"}


def given(tmp_path, **fields):
    return argparse.Namespace(**{"output": tmp_path, "budget": 100.0, "dry_run_cpu": False} | fields)


PART = Part("part", "none", "", 50, 10, 20, True)


def test_a_worker_that_hangs_in_a_case_is_killed_for_it_alone(tmp_path):
    program = """
import json, sys, time
with open(sys.argv[1], "a") as file:
    for line in ({"case": "a"}, {"case": "a", "figures": {}}, {"case": "b"}):
        print(json.dumps(line), file=file, flush=True)
        time.sleep(0.3)
    print('{"case": "cut', file=file, flush=True)
time.sleep(60)
"""
    file = tmp_path / "cases.jsonl"
    process = subprocess.Popen([sys.executable, "-c", program, str(file)], process_group=0)
    work = run.Run(given(tmp_path), {})
    why = run._watch(process, file, 50.0, 1.0, lambda lines: work._add_new(PART, lines))
    assert why.startswith("not done after ")
    assert (tmp_path / "gpu.jsonl").read_text() == '{"part": "part", "case": "a", "figures": {}}\n'  # before the end
    assert process.returncode < 0
    finished = run._finished(run._lines(file), why)
    assert finished == [{"case": "a", "figures": {}}, {"case": "b", "error": why}]


def test_a_worker_does_not_outlive_an_interrupted_run(tmp_path, monkeypatch):
    processes = []

    def interrupted(process, *_):
        processes.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_watch", interrupted)
    work = run.Run(given(tmp_path), dict(host.prepare(tmp_path / "site", None)[0]))
    with pytest.raises(KeyboardInterrupt):
        work._process(PART, [], 50.0)
    assert processes[0].returncode < 0


def test_what_cases_leave_for_the_reader_is_kept(tmp_path):
    work = run.Run(given(tmp_path), {})
    kept = tmp_path / "scratch" / run.KEPT
    kept.mkdir(parents=True)
    (kept / "trace.json.gz").write_bytes(b"x")
    work._keep(kept)
    work._keep(tmp_path / "none")
    assert (tmp_path / "trace.json.gz").read_bytes() == b"x"


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
    assert ended == "the part's 0 s were over"


def test_parts_behind_the_budget_are_dropped(tmp_path, monkeypatch):
    work = run.Run(given(tmp_path, budget=12.0), {})
    monkeypatch.setattr(work, "_process", lambda *_: pytest.fail("no process may begin"))
    work.part(PART)
    assert work.results[0]["dropped"].endswith("s were left")
    assert "| part | all | dropped: " in table.render(work.results)


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
    assert unpacked == ["acme_zeta-1.0-py3-none-any.whl"]  # this pytest is newer
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
