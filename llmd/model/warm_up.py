"""Steps that nobody asked for, before anyone waits: kernels are compiled, thread pools and buffers exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def warm_up(runner: Runner) -> None:
    """The longest prompt step, and a decode step; on a GPU one for each way of sampling."""
    num_tokens = _prompt_length(runner)
    if num_tokens < 1:
        return
    params = SamplingParams(temperature=0.0, max_tokens=2) if runner.can_generate else PoolingParams()
    _run(runner, num_tokens, params)
    if runner.can_generate and runner.device.type != "cpu":
        for params in _WISHES:
            _run(runner, 1, params)


def _prompt_length(runner: Runner) -> int:
    room = runner.max_model_len if not runner.num_blocks else runner.num_blocks * runner.rows.block_size - 1
    count = min(runner.max_num_batched_tokens, runner.max_model_len - 1, room)
    return min(count, _CPU_TOKENS) if runner.device.type == "cpu" else count


def _run(runner: Runner, count: int, params: SamplingParams | PoolingParams) -> None:
    """A prompt of `count` tokens in row 0, and a token after it."""
    generates = isinstance(params, SamplingParams)
    blocks = range(-(-(count + 1) // runner.rows.block_size))
    copies = [BlockCopy(0, 1)] if runner.num_blocks > 1 else []
    admit = RowAdmit(
        row=0, seq_id=0, request_id="warm-up", token_ids=(0,) * count, num_prompt_tokens=count, params=params, seed=0
    )
    runner.run(
        StepPlan(
            step_id=-2, admitted=[admit], block_updates=[BlockUpdate(0, 0, 0, blocks)], block_copies=copies, rows=[0],
            starts=[0], counts=[count], num_logits=[int(generates)], samples=[generates],
        )
    )  # fmt: skip
    if generates:
        runner.run(StepPlan(step_id=-1, rows=[0], starts=[count], counts=[1], num_logits=[1], samples=[True]))
    runner.run(StepPlan(step_id=-1, released=[0]))
