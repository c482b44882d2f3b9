"""Tuning without a GPU: what is tried, what is written, and what a process that breaks leaves behind."""

import ast
import json
import sys
import time
from unittest import mock

import pytest
import torch
from gpu.fake_gpu import fake_gpu

from benchmarks.gpu import tables, tune, tuned, tuning
from benchmarks.gpu.host import ROOT
from benchmarks.gpu.setting import Setting

pytest.importorskip("triton")


@pytest.fixture(params=tune.ORDER)
def target(request):
    """With the module's numbers put back afterwards."""
    made = tuned.TARGETS[request.param]()
    entries = made.entries()
    yield made
    for key, tile in entries.items():
        made.set(key, tile)


def shown(tile):
    return tables.called(tile) if isinstance(tile, tuple) else str(tile)


@pytest.fixture
def device():
    with fake_gpu() as device:
        yield device


def test_every_table_is_timed_on_a_device_with_the_tile_in_its_place(target, device):
    """On one that computes nothing: the present tile of each entry, and one that would be tried."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    for key, present in target.entries().items():
        other = next(tile for tile in target.candidates(key, present) if tile not in (None, present))
        launches = {}
        for tile in (present, other):
            seen = launches[tile] = []

            def run(kernel, *args, grid, seen=seen, **kwargs):
                seen.append((kernel.fn.__name__, grid, str(kwargs)))
                return launch(kernel, *args, grid=grid, **kwargs)

            with mock.patch.object(JITFunction, "run", run):
                assert target.time(key, tile) >= 1.0
            assert tile is None or seen, (key, tile)
        assert launches[present] != launches[other], (key, other)


def test_every_table_has_a_place_in_the_order():
    assert tuple(tuned.TARGETS) == tune.ORDER
    found = {
        path.parent.name for name in ("tiles", "table") for path in (ROOT / "kernels").glob(f"llmd_kernels/*/{name}.py")
    }
    assert found <= set(tune.ORDER)


def test_a_table_that_stays_as_it_is_is_written_back_letter_by_letter(target):
    assert tuning.difference(target) == ""
    assert tuning.tune(target, lambda key, tile: 1.0) == []
    assert tuning.difference(target) == ""


def test_the_quickest_tile_is_written(target, tmp_path):
    present = target.entries()
    key = next(iter(present))
    wanted = next(tile for tile in target.candidates(key, present[key]) if tile not in (None, present[key]))
    decided = []
    changes = tuning.tune(
        target,
        lambda at, tile: 1.0 if (at, tile) == (key, wanted) else 5.0,
        decided=lambda: decided.append(tuning.difference(target)),
    )
    assert len(changes) == len(decided) == 1
    assert shown(wanted) in decided[0]
    name = str(target.path.relative_to(ROOT))
    assert decided[0].startswith(f"--- a/{name}\n+++ b/{name}\n")
    here = tmp_path / "table.py"
    here.write_text(target.path.read_text())
    target.path = here
    target.write()
    assert shown(wanted) in here.read_text()
    ast.parse(here.read_text())


class Tiles:
    """A table of one entry whose tiles are pairs; the best is (8, 8)."""

    name, assigned = "pairs", ""

    def __init__(self):
        self.tile = (1, 1)

    def entries(self):
        return {"all": self.tile}

    def candidates(self, key, present):
        return [(present[0] * 2, present[1]), (present[0], present[1] * 2)]

    def set(self, key, tile):
        self.tile = tile


def test_a_search_goes_on_from_what_it_found():
    pairs, tried, prepared = Tiles(), [], []

    def measure(key, tile):
        tried.append(tile)
        return 100.0 / (min(tile[0], 8) * min(tile[1], 2))

    changes = tuning.tune(pairs, measure, prepare=lambda key, tiles: prepared.append(list(tiles)))
    assert pairs.tile == (8, 2)
    assert len(tried) == len(set(tried))
    assert prepared[0] == [(1, 1), (2, 1), (1, 2)]
    assert changes[0].startswith("pairs all: (1, 1) 100.0000 ms -> (8, 2) 6.2500 ms")


def test_noise_changes_nothing_and_the_budget_ends_the_trials():
    pairs, start = Tiles(), time.monotonic()
    assert tuning.tune(pairs, lambda key, tile: 1.0 if tile == (1, 1) else 0.98) == []
    assert tuning.tune(pairs, lambda *_: pytest.fail("nothing may be tried"), lambda: time.monotonic() >= start) == [
        "pairs: the rest was not tried, the budget was spent"
    ]


def test_times_are_known_again_and_what_failed_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []

    class Target(Tiles):
        def time(self, key, tile):
            calls.append(tile)
            if tile == (2, 1):
                raise RuntimeError("out of resource: shared memory")
            return 0.123456789

    file = tmp_path / "tune.jsonl"
    for _ in range(2):
        times = tuning.Times(file)
        assert times.measure(Target(), "all", (1, 1)) == 0.12346
        assert times.measure(Target(), "all", (2, 1)) == float("inf")
    assert calls == [(1, 1), (2, 1)]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[-1] == {"table": "pairs", "entry": "'all'", "tile": "(2, 1)", "ms": None, "why": lines[-1]["why"]}
    assert lines[-1]["why"].startswith("RuntimeError: out of resource")


def test_a_tile_that_broke_the_process_is_given_up(tmp_path):
    file = tmp_path / "tune.jsonl"
    assert not tune.give_up_last(file)
    begun = {"table": "pairs", "entry": "'all'", "tile": "(2, 1)"}
    file.write_text(json.dumps(begun) + "\n")
    assert tune.give_up_last(file)
    assert not tune.give_up_last(file)
    assert tuning.Times(file).knows(Tiles(), "all", (2, 1))


def test_a_process_that_hangs_is_killed(tmp_path):
    process = tune.subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], process_group=0)
    assert tune.watch(process, tmp_path / "none", 0.3) != 0


def test_compiling_calls_the_work_once(monkeypatch):
    calls = []

    def timed(self, key, tile):
        return tuned.median_ms(Setting(torch.device("cpu"), True, "", None, {}), lambda: calls.append(tile))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with mock.patch.object(tuned.Linear, "time", timed):
        assert tuning.call_once("fp8_linear", 16, "tile") == ""
    assert calls == ["tile"]
    with mock.patch.object(tuned.Linear, "time", side_effect=ValueError("no")):
        assert tuning.call_once("fp8_linear", 16, "tile") == "ValueError: no"


def test_a_device_without_a_table_begins_with_the_nearest():
    for kind in (tuned.Attention, tuned.Experts):
        assert tuning.difference(kind("sm_100")).count('+    "sm_100": ') == 1


def test_a_whole_run_writes_a_patch_that_can_be_applied(tmp_path, monkeypatch):
    """Of one table, with times that are made up; nothing is compiled."""
    monkeypatch.setattr(tuning.Compilers, "prepare", lambda self, name, key, tiles: None)
    monkeypatch.setattr(tuned.Linear, "time", lambda self, key, tile: 1.0 if tile.stages == 2 else 2.0)
    before = (ROOT / "kernels/llmd_kernels/fp8_linear/tiles.py").read_text()
    tuning.run(["fp8_linear"], tmp_path, 60.0, is_dry=True)
    assert (ROOT / "kernels/llmd_kernels/fp8_linear/tiles.py").read_text() == before
    patch = tmp_path / "tune.patch"
    check = ["git", "apply", "--check", str(patch)]
    assert tune.subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False).stderr == ""
    assert patch.read_text().count("\n+    (") >= 2


def test_tuning_without_a_gpu_tells_what_it_would_try(tmp_path, capfd):
    assert tune.main(["--dry-run", "--only", "fp8_linear", "--output", str(tmp_path)]) == 0
    assert "fp8_linear {16: " in capfd.readouterr().out
    with (
        mock.patch.object(sys, "argv", ["tuning", "--only", "fp8_linear", "--output", str(tmp_path), "--budget", "9"]),
        pytest.raises(SystemExit, match="there is no GPU"),
    ):
        tuning.main()


def test_what_is_not_there_cannot_be_rewritten():
    with pytest.raises(ValueError, match="zeta is assigned nowhere"):
        tables.replaced("a = 1\n", "zeta", [])
    with pytest.raises(ValueError, match="zeta is assigned 0 numbers"):
        tables.renumbered("a = 1\n", "zeta", 2)
    assert tables.renumbered("a = 1  # why\nab = 3\n", "a", 22) == "a = 22  # why\nab = 3\n"
