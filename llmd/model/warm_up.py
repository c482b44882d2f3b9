"""Steps that nobody asked for, before anyone waits: kernels are compiled, thread pools and buffers exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.step import BlockCopy, BlockUpdate, RowAdmit, StepPlan

if TYPE_CHECKING:
    from llmd.model.runner import Runner

_CPU_TOKENS = 16
_WISHES = (  # what a GPU's sampler has kernels for
    SamplingParams(max_tokens=2),
    SamplingParams(max_tokens=2, top_k=20),
    SamplingParams(max_tokens=2, top_p=0.9),
    SamplingParams(max_tokens=2, top_k=20, top_p=0.9, min_p=0.05),
    SamplingParams(max_tokens=2, temperature=0.0, repetition_penalty=1.1, logit_bias={0: 1.0}),
    SamplingParams(max_tokens=2, temperature=0.0, logprobs=3),
)
_DEAREST = SamplingParams(max_tokens=2, top_k=20, top_p=0.9, repetition_penalty=1.1, logprobs=20)  # in memory


def warm_up(runner: Runner) -> None:
    """On a GPU each way of sampling and then the largest step; on a CPU a short prompt."""
    num_tokens = _most_tokens(runner)
    if num_tokens < 1:
        return
    if not runner.can_generate:
        _run(runner, [num_tokens], PoolingParams())
    elif runner.device.type == "cpu":
        _run(runner, [min(num_tokens, _CPU_TOKENS)], SamplingParams(temperature=0.0, max_tokens=2))
    else:
        for params in _WISHES:
            _run(runner, [1], params)
        others = min(runner.rows.max_num_rows, num_tokens) - 1
        _run(runner, [num_tokens - others, *[1] * others], _DEAREST)


def _most_tokens(runner: Runner) -> int:
    room = runner.max_model_len if not runner.num_blocks else runner.num_blocks * runner.rows.block_size - 1
    return min(runner.max_num_batched_tokens, runner.max_model_len - 1, room)


def _run(runner: Runner, counts: list[int], params: SamplingParams | PoolingParams) -> None:
    """A prompt in each row, of so many tokens, and a token after it. All have the same blocks: nobody looks into them."""
    generates, rows = isinstance(params, SamplingParams), list(range(len(counts)))
    block_size = runner.rows.block_size
    admitted = [
        RowAdmit(
            row=row, seq_id=row, request_id="warm-up", token_ids=(0,) * count, num_prompt_tokens=count, params=params, seed=0
        )
        for row, count in enumerate(counts)
    ]  # fmt: skip
    updates = [BlockUpdate(row, 0, 0, range(-(-(count + 1) // block_size))) for row, count in enumerate(counts)]
    columns: dict[str, Any] = {"rows": rows, "num_logits": [int(generates)] * len(rows), "samples": [generates] * len(rows)}
    runner.run(
        StepPlan(
            step_id=-2, admitted=admitted, block_updates=updates, starts=[0] * len(rows), counts=counts,
            block_copies=[BlockCopy(0, 1)] if runner.num_blocks > 1 else [], **columns,
        )
    )  # fmt: skip
    if generates:
        runner.run(StepPlan(step_id=-1, starts=counts, counts=[1] * len(rows), **columns))
    runner.run(StepPlan(step_id=-1, released=rows))
