"""Logits processors: they touch their own rows only, alone as in a batch, and keep what they promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmd.api.v1 import LogitsContext, LogitsProcessor, RowAdmit, Rows, SamplingParams
from llmd.api.v1.testing.compare import require

_NUM_ROWS, _LEN, _VOCAB = 8, 32, 64


def check_logits_processor(
    build: Callable[[LogitsContext], LogitsProcessor],
    params: SamplingParams,
    *,
    not_wanted: SamplingParams | None = None,
    prompt: Sequence[int] = (1, 2, 3, 4),
) -> None:
    """A processor that wants `params` and does not want `not_wanted` (by default: plain ones).

    Over 64 tokens and 8 rows: rows of others stay bit for bit as they are, a row alone gets what it gets beside others,
    rows may be admitted again and released in any order, `keeps_argmax` holds where it is claimed.
    """
    context = LogitsContext(max_num_rows=_NUM_ROWS, max_model_len=_LEN, vocab_size=_VOCAB, device=torch.device("cpu"))
    processor = build(context)
    require(processor.wants(params), f"wants({params}) is False; expected: True")
    require(not processor.wants(not_wanted or SamplingParams()), "wants plain params too; expected: only its own")
    lines, logits = [5, 2, 7], torch.randn(5, _VOCAB, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(_NUM_ROWS, _LEN, dtype=torch.int32)
    for line in lines:
        tokens[line, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        processor.admit(_admit(line, params, prompt))
    processor.admit(_admit(lines[0], params, prompt))  # preempted and back
    together = _applied(processor, logits, [3, 0, 4], lines, tokens, len(prompt))
    for place in (1, 2):
        require(bool((together[place] == logits[place]).all()), f"row {place} wants nothing, and was changed")
    alone = _applied(processor, logits, [3], lines[:1], tokens, len(prompt))
    require(torch.equal(alone[3], together[3]), "a row gets other logits alone than in a batch")
    if processor.keeps_argmax:
        require(torch.equal(together.argmax(1), logits.argmax(1)), "keeps_argmax is claimed, and the largest token changed")
    processor.release(lines[0])
    after = _applied(processor, logits, [0, 4], lines[1:], tokens, len(prompt))
    require(torch.equal(after[[0, 4]], together[[0, 4]]), "releasing one row changed what another gets")


def _admit(row: int, params: SamplingParams, prompt: Sequence[int]) -> RowAdmit:
    return RowAdmit(
        row=row, seq_id=row, request_id=f"r{row}", token_ids=tuple(prompt), num_prompt_tokens=len(prompt), params=params,
        seed=row,
    )  # fmt: skip


def _applied(
    processor: LogitsProcessor, logits: Tensor, places: list[int], lines: list[int], tokens: Tensor, length: int
) -> Tensor:
    rows = Rows(
        at=torch.tensor(places), ids=torch.tensor(lines), host_ids=tuple(lines), max_tokens=length, token_ids=tokens,
        num_tokens=torch.full((len(lines),), length),
    )  # fmt: skip
    given = logits.clone()
    result = processor.apply(given, rows)
    require(result.shape == logits.shape and result.dtype == torch.float32, "apply must return [R, V] float32")
    return result
