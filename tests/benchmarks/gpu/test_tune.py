"""Tuning without a GPU: what is tried, what is written, and when nothing is."""

import ast
import time

import pytest

from benchmarks.gpu import tables, tune, tuned


@pytest.mark.parametrize("name", sorted(tuned.TARGETS))
def test_a_table_that_stays_as_it_is_is_written_back_letter_by_letter(name):
    target = tuned.TARGETS[name]()
    assert tune.difference(target) == ""
    assert tune.tune(target, lambda key, tile: 1.0) == []
    assert tune.difference(target) == ""


@pytest.mark.parametrize("name", sorted(tuned.TARGETS))
def test_the_quickest_tile_is_written(name, tmp_path):
    target = tuned.TARGETS[name]()
    present = target.entries()
    key = next(iter(present))
    wanted = next(tile for tile in target.candidates(key, present[key]) if tile != present[key])
    changes = tune.tune(target, lambda at, tile: 1.0 if (at, tile) == (key, wanted) else float("inf") if at == key else 2.0)
    assert len(changes) == 1
    assert tables.called(wanted) in changes[0] or str(wanted) in changes[0]
    assert "+    " in (patch := tune.difference(target))
    assert tables.called(wanted) in patch
    here = tmp_path / "table.py"
    here.write_text(target.path.read_text())
    target.path = here
    target.write()
    assert tables.called(wanted) in here.read_text()
    assert here.read_text().count("\n") == ast.parse(here.read_text()).body[-1].end_lineno


def test_noise_changes_nothing_and_the_budget_ends_the_trials():
    target, start = tuned.TARGETS["fp8_linear"](), time.monotonic()
    present = target.entries()
    assert tune.tune(target, lambda key, tile: 1.0 if tile == present[key] else 0.98) == []
    assert tune.tune(target, lambda *_: pytest.fail("nothing may be tried"), lambda: time.monotonic() >= start) == [
        "fp8_linear: the rest was not tried, the budget was spent"
    ]


def test_a_device_without_a_table_begins_with_the_nearest():
    target = tuned.Attention("sm_100")
    assert tune.difference(target).count('+    "sm_100": {') == 1


def test_tuning_without_a_gpu_shows_what_it_would_try(capsys):
    assert tune.main(["--dry-run", "--only", "fp8_linear"]) == 0
    assert "fp8_linear: tiles to try by entry" in capsys.readouterr().out
    with pytest.raises(ValueError, match="zeta is assigned nowhere"):
        tables.replaced("a = 1\n", "zeta", [])
