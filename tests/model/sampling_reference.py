"""Sampling of one row in plain Python, after vLLM's documentation: slow, obvious, and independent of the code under test."""

import itertools
import math

import torch

from llmd.engine.params import SamplingParams
from llmd.engine.step import RowAdmit
from llmd.model.logits import LogitsContext, Rows

V, MAX_LEN, NUM_ROWS = 300, 64, 16
CPU = torch.device("cpu")
CONTEXT = LogitsContext(max_num_rows=NUM_ROWS, max_model_len=MAX_LEN, vocab_size=V, device=CPU)
MASK = (1 << 64) - 1


def python_uniform(seed: int, counter: int) -> float:
    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mix((mix((seed + golden) & MASK) + mix((counter * golden + 1) & MASK)) & MASK) >> 11) / (1 << 53)


def make_admit(row=0, *, tokens=(1, 2, 3), num_prompt=2, seed=0, eos=(), bad_words_ids=(), **params) -> RowAdmit:
    if bad_words_ids:
        params["bad_words"] = ["word"] * len(bad_words_ids)
    return RowAdmit(
        row=row,
        seq_id=row,
        request_id=f"r{row}",
        token_ids=list(tokens),
        num_prompt_tokens=num_prompt,
        params=SamplingParams(**params),
        seed=seed,
        eos_token_ids=tuple(eos),
        bad_words_ids=tuple(bad_words_ids),
    )


def apply(processor, logits, admits, places=None):
    """Admit and apply once to rows that stand at `places` of the batch."""
    token_ids = torch.full((NUM_ROWS, MAX_LEN), 123_456, dtype=torch.int32)
    for admit in admits:
        token_ids[admit.row, : len(admit.token_ids)] = torch.tensor(admit.token_ids, dtype=torch.int32)
        processor.admit(admit)
    host_ids = tuple(admit.row for admit in admits)
    num_tokens = [len(admit.token_ids) for admit in admits]
    rows = Rows(
        at=torch.tensor(places or list(range(len(admits)))),
        ids=torch.tensor(host_ids),
        host_ids=host_ids,
        num_tokens=torch.tensor(num_tokens),
        max_tokens=max(num_tokens),
        token_ids=token_ids,
    )
    return processor.apply(logits.clone(), rows)


def processed(logits: list[float], admit: RowAdmit, tokens: list[int]) -> list[float]:
    """The row's logits after biases, masks and penalties. `tokens` are all that the row has."""
    params, prompt, output = admit.params, tokens[: admit.num_prompt_tokens], tokens[admit.num_prompt_tokens :]
    assert isinstance(params, SamplingParams)
    out = list(logits)
    for token, bias in (params.logit_bias or {}).items():
        out[token] += bias
    if params.allowed_token_ids is not None:
        out = [x if token in params.allowed_token_ids else -math.inf for token, x in enumerate(out)]
    if len(output) < params.min_tokens:
        for token in (*admit.eos_token_ids, *params.stop_token_ids):
            out[token] = -math.inf
    for word in admit.bad_words_ids:
        *prefix, last = word
        if len(output) >= len(prefix) and output[len(output) - len(prefix) :] == prefix:
            out[last] = -math.inf
    for token in set(prompt) | set(output):
        out[token] = out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
    for token in set(output):
        out[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return out


def distribution(logits: list[float], params: SamplingParams) -> list[float]:
    """The exact filtered softmax; ties at a cut stay together."""
    best = max(logits)
    if params.is_greedy:
        first = logits.index(best)
        return [float(token == first) for token in range(len(logits))]
    p = [math.exp((x - best) / params.temperature) for x in logits]
    p = [x if x >= params.min_p else 0.0 for x in p]
    if 0 < params.top_k < len(logits):
        kth = sorted(logits, reverse=True)[params.top_k - 1]
        p = [x if logit >= kth else 0.0 for x, logit in zip(p, logits, strict=True)]
    if params.top_p < 1:
        total = math.fsum(p)
        descending = sorted(zip(logits, p, strict=True), reverse=True)
        reached = sum(share < params.top_p * total for share in itertools.accumulate(x for _, x in descending))
        last = descending[min(reached, len(descending) - 1)][0]
        p = [x if other >= last else 0.0 for x, other in zip(p, logits, strict=True)]
    total = math.fsum(p)
    return [x / total for x in p]


def is_draw(p: list[float], uniform: float, token: int, tolerance: float = 1e-5) -> bool:
    """Whether `uniform` falls on `token` in the cumulated distribution, up to rounding at the borders."""
    before = math.fsum(p[:token])
    return p[token] > 0 and before - tolerance <= uniform <= before + p[token] + tolerance
