"""The loop thread's cost of a step with many running sequences: schedule and commit, no device behind them.

    python benchmarks/engine/step_loop.py [--sequences 256] [--steps 400] [--output FILE]

A fast device waits for nothing but these two. Each step is planned with one step in flight, as in service; every sequence
decodes, one in sixteen crosses into a new KV block. Prints medians in microseconds as JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import deque
from pathlib import Path

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.executor import ExecutorInfo
from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.scheduler import Scheduler
from llmd.engine.step import StepPlan, StepResult
from llmd_plugins.scheduling.fcfs import FcfsQueue

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import report


def result_of(plan: StepPlan) -> StepResult:
    """What a device would answer: a token for each row that samples."""
    return StepResult(step_id=plan.step_id, token_ids=[17] * sum(plan.samples))


def measure(num_sequences: int, num_steps: int) -> dict[str, float]:
    """Median microseconds of schedule and of commit at steady state."""
    info = ExecutorInfo(
        num_blocks=num_sequences * 64, block_size=16, max_num_seqs=num_sequences, max_model_len=1024, vocab_size=32000
    )
    config = SchedulerConfig(max_num_seqs=num_sequences, max_num_batched_tokens=8192)
    scheduler = Scheduler(config, CacheConfig(), info, FcfsQueue())
    for index in range(num_sequences):
        prompt = Prompt(tuple((index * 31 + position) % 32000 for position in range(64 + index % 64)))
        params = SamplingParams(max_tokens=num_steps + 200, ignore_eos=True)
        scheduler.add(Request(request_id=str(index), prompt=prompt, params=params, eos_token_ids=(2,)), seed=index)
    in_flight: deque = deque()
    schedule_us, commit_us = [], []
    while len(commit_us) < num_steps:
        began = time.perf_counter()
        step = scheduler.schedule(0.0)
        planned = time.perf_counter()
        assert step is not None
        in_flight.append((step, result_of(step.plan)))
        if len(in_flight) < 2:
            continue
        committed, result = in_flight.popleft()
        taken = time.perf_counter()
        scheduler.commit(committed, result)
        done = time.perf_counter()
        if committed.num_decodes == num_sequences:
            schedule_us.append((planned - began) * 1e6)
            commit_us.append((done - taken) * 1e6)
    both = [left + right for left, right in zip(schedule_us, commit_us, strict=True)]
    return {
        "schedule_us": round(statistics.median(schedule_us), 1),
        "commit_us": round(statistics.median(commit_us), 1),
        "both_us": round(statistics.median(both), 1),
        "both_p99_us": round(sorted(both)[int(len(both) * 0.99)], 1),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sizes = {"sequences": options.sequences, "steps": options.steps}
    report(sizes | measure(options.sequences, options.steps), options.output)


if __name__ == "__main__":
    main()
