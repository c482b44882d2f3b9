"""What tells a long prompt from a hang, on a CPU and without one."""

from __future__ import annotations

import threading
import time

from model.step_driver import GREEDY, make_runner
from model.tiny_models import make_model, save_model

from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan
from llmd.model.moves import Moves


def work(seconds: float) -> None:
    until_s = time.thread_time() + seconds
    while time.thread_time() < until_s:
        sum(range(1000))


def test_layers_are_moves():
    done = [0]
    moves = Moves(lambda: done[0])
    before = moves.number
    assert moves.number == before
    done[0] += 1
    assert moves.number != before


def test_work_of_the_thread_is_a_move_for_a_bounded_time(monkeypatch):
    monkeypatch.setattr("llmd.model.moves._LAYER_S", 0.3)
    moves, go = Moves(lambda: 0), threading.Event()

    def run() -> None:
        moves.follow_this_thread()
        go.wait(10)
        work(0.8)
        go.clear()
        while not go.is_set():
            time.sleep(0.01)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.1)
    waiting = moves.number
    time.sleep(0.2)
    assert moves.number == waiting  # it only waits
    go.set()
    seen = set()
    while go.is_set():
        seen.add(moves.number)
        time.sleep(0.01)
    go.set()
    thread.join()
    assert 2 <= len(seen) <= 5  # tenths of a second, at most three of them
    assert moves.number[0] == 0


def test_a_call_that_is_no_step_may_take_its_time(monkeypatch):
    monkeypatch.setattr("llmd.model.moves._CALL_S", 0.3)
    moves, seen = Moves(lambda: 0), set()

    def call() -> str:
        for _ in range(12):
            time.sleep(0.05)
            seen.add(moves.number)
        return "done"

    assert moves.call(call) == "done"
    assert 3 <= len(seen) <= 4
    assert moves.number == (0, 0, 0)


def test_a_runner_counts_its_layers(tmp_path):
    runner = make_runner(save_model(make_model("Llama"), tmp_path))
    before = runner.num_layers_done
    admit = RowAdmit(row=0, seq_id=1, request_id="r", token_ids=(1, 2, 3), num_prompt_tokens=3, params=GREEDY, seed=0)
    plan = StepPlan(
        step_id=0, admitted=[admit], block_updates=[BlockUpdate(0, 0, 0, (0,))], rows=[0], starts=[0], counts=[3],
        num_logits=[1], samples=[True],
    )  # fmt: skip
    runner.run(plan)
    assert runner.num_layers_done - before == runner.model.config.num_layers
