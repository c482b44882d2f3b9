"""Runs the Triton kernels around a step in the interpreter; prints for each case how many numbers differ from the reference.

The interpreter's exp is numpy's: draws may differ from torch's where a weight's last bit decides, which no case here hits.
"""

import json

import torch

from llmd_kernels import bitmask, embedding, logprobs, penalties, prepare_batch, sampling
from llmd_kernels.bitmask import triton as bitmask_kernels
from llmd_kernels.embedding import triton as embedding_kernels
from llmd_kernels.logprobs import triton as logprobs_kernels
from llmd_kernels.penalties import triton as penalties_kernels
from llmd_kernels.prepare_batch import triton as prepare_batch_kernels
from llmd_kernels.sampling import triton as sampling_kernels

torch.manual_seed(0)
found = {}
INF = float("inf")


def differ(name, actual, expected):
    """How many entries are not equal, NaN equal to NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    found[name] = found.get(name, 0) + int((~same).sum())


for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
    table, ids = torch.randn(7, 1100).mul(9).to(dtype)[:, :1030], torch.tensor([[6, 0], [-1, 7], [3, 1 << 40]])
    differ("embedding", embedding_kernels.embedding(ids, table), embedding.reference.embedding(ids, table))

for counts, num_places, with_blocks in (
    ([1], 1, True), ([1, 1, 1], 8, True), ([5, 1, 70, 0, 1], 77, True), ([0, 3], 3, False), ([0, 0], 4, True),
    ([1] * 131, 160, True),
):  # fmt: skip
    num_rows = len(counts)
    rows, starts = torch.randperm(140)[:num_rows], torch.randint(0, 50, (num_rows,))
    columns = torch.stack((rows, starts, torch.tensor(counts)))
    tokens, blocks = torch.randint(0, 999, (140, 130)).int(), torch.randint(0, 99, (140, 30)).int()
    made = [prepare_batch.new_inputs(num_places, num_rows, rows.device, has_blocks=with_blocks) for _ in range(2)]
    for inputs, write in zip(
        made, (prepare_batch_kernels.prepare_batch, prepare_batch.reference.prepare_batch), strict=True
    ):
        for column in inputs:
            column.fill_(-5)
        write(inputs, columns, tokens, blocks if with_blocks else None, 5, 13)
    for name, actual, expected in zip(made[0]._fields, *made, strict=True):
        differ(f"prepare_batch {name}", actual, expected)

for num_rows, with_blocks in ((1, True), (131, True), (5, False), (0, True)):
    columns = torch.stack(
        (torch.randperm(140)[:num_rows], torch.randint(0, 50, (num_rows,)), torch.randint(-40, 40, (num_rows,)))
    )
    tokens, blocks = torch.randint(0, 999, (140, 130)).int(), torch.randint(0, 99, (140, 30)).int()
    columns = torch.cat((columns, columns[:, :1]), 1)[:, :num_rows]  # a stride of its own
    tables, made = [blocks, blocks.clone()], []
    for table, write in zip(
        tables, (prepare_batch_kernels.prepare_decode, prepare_batch.reference.prepare_decode), strict=True
    ):
        sizes = num_rows, num_rows if with_blocks else 0, num_rows, num_rows
        types = torch.int64, torch.int64, torch.int32, torch.int64
        made.append(
            prepare_batch.DecodeInputs(*(torch.full((size,), -5, dtype=of) for size, of in zip(sizes, types, strict=True)))
        )
        write(made[-1], columns, tokens, table if with_blocks else None, 5)
    for name, actual, expected in zip(made[0]._fields, *made, strict=True):
        differ(f"prepare_decode {name}", actual, expected)
    differ("prepare_decode's block tables", *tables)

for width, places in ((31, [2]), (5003, [4, 0, 1]), (4096, [])):
    logits, words = torch.randn(5, width), torch.randint(-(1 << 31), 1 << 31, (len(places), -(-width // 32) + 1)).int()
    words[:, 1:3] = -1
    given = torch.tensor(places, dtype=torch.int64), words
    expected = bitmask.reference.mask_logits(logits.clone(), *given)
    differ("mask_logits", bitmask_kernels.mask_logits(logits, *given), expected)

for num_rows in (0, 3, 200):
    tokens, best, rows = torch.randint(0, 1 << 18, (num_rows,)), torch.randn(num_rows), torch.randperm(210)[:num_rows]
    lines, num_tokens = [torch.zeros(210, 9).int() for _ in range(2)], torch.randint(0, 9, (num_rows,))
    outs = [torch.full((2, num_rows), -5, dtype=torch.int32) for _ in range(2)]
    sampling_kernels.deliver(tokens, best, rows, num_tokens, lines[0], outs[0])
    sampling.reference.deliver(tokens, best, rows, num_tokens, lines[1], outs[1])
    differ("delivered", *outs)
    differ("delivered to lines", *lines)

FULL, OFF = 1 << 20, 1.0
WISHES = (  # 1 / temperature, top_k, top_p, min_p
    (0.0, FULL, 0.5, 0.0), (1.0, FULL, OFF, 0.0), (0.5, 5, 0.9, 0.0), (1.3, FULL, OFF, 0.05), (2.0, 1, 0.3, 0.0),
    (1.0, 20, OFF, 0.0), (0.01, FULL, 0.95, 0.01), (1.0, 3, 0.2, 1.0), (100.0, 100, 0.999, 0.0), (1.0, 129, 0.7, 1e-4),
)  # fmt: skip
knobs = sampling.Knobs(
    torch.randint(-(1 << 62), 1 << 62, (len(WISHES),)),
    torch.stack([torch.tensor(column).float().double() if at != 2 else torch.tensor(column, dtype=torch.float64)
                 for at, column in enumerate(zip(*WISHES, strict=True))], 1).contiguous(),
)  # fmt: skip
for width, splits, scale in ((1, 1, 1.0), (130, 1, 0.1), (3003, 2, 4.0)):
    limited = knobs._replace(values=torch.minimum(knobs.values, torch.tensor([1e9, width, 1e9, 1e9], dtype=torch.float64)))
    logits = torch.randn(len(WISHES), width) * scale
    logits[2], logits[5] = logits[2].round(), logits[5].round()  # ties at the cuts
    logits[3:6, : width // 3] = -INF
    logits[7, ::2] = -0.0
    logits[7, 1::2] = 0.0
    rows, num_tokens = torch.randperm(len(WISHES)), torch.randint(1, 1 << 20, (len(WISHES),))
    expected = sampling.reference.sample(logits, rows, num_tokens, limited)
    actual = sampling_kernels.sample(logits, rows, num_tokens, limited, splits=splits)
    differ(f"tokens of {width}", actual[0], expected[0])
    differ("largest logits", actual[1], expected[1])

plain = knobs._replace(values=torch.tensor([[1.0, FULL, 1.0, 0.0]] * len(WISHES), dtype=torch.float64))
logits, rows, num_tokens = torch.randn(4, 300), torch.arange(4), torch.tensor([1, 2, 3, 4])
no_cuts = {"any_top_k": False, "any_top_p": False}
for flags in ({}, {"any_top_p": False}, no_cuts):
    actual = sampling_kernels.sample(logits[:1], rows[:1], num_tokens[:1], plain, **flags)[0]
    differ("tokens whatever the flags", actual, sampling.reference.sample(logits, rows, num_tokens, plain)[0][:1])
for splits in (1, 2, 4):
    wide = logits.repeat(1, 20)
    actual = sampling_kernels.sample(wide, rows, num_tokens, plain, **no_cuts, splits=splits)[0]
    differ("tokens whatever the splits", actual, sampling.reference.sample(wide, rows, num_tokens, plain)[0])
greedy = plain._replace(values=plain.values.clone().index_fill_(1, torch.tensor([0]), 0.0))
logits = torch.randn(4, 2100).half()
logits[0, 7], logits[1, 3], logits[1, 2050] = float("nan"), INF, INF
logits[2] = -INF
logits[3, 1999] = logits[3, 1030] = 99.0
actual = sampling_kernels.sample(logits, rows, num_tokens, greedy, any_drawn=False, splits=2)
differ("greedy", actual[0], torch.tensor([7, 3, 0, 1030]))
differ("greedy largest", actual[1], torch.tensor([float("nan"), INF, -INF, 99.0]))
broken = sampling_kernels.sample(logits, rows, num_tokens, plain)[0]
found["a token of a broken row is outside"] = int(((broken < 0) | (broken >= 2100)).sum())
empty = sampling_kernels.sample(logits[:0], rows[:0], num_tokens[:0], plain)
found["tokens of no rows"] = empty[0].numel() + empty[1].numel()

for width, num, limit in ((50, 3, 1 << 20), (3000, 5, 2)):
    token_ids, num_tokens = torch.randint(-2, min(width, 40) + 2, (9, 2500)).int(), torch.tensor([0, 2500, 7, 1, 1300])[:num]
    rows = torch.randperm(9)[:num]
    facts = torch.stack(
        (torch.tensor([3.0, 900, 0, 2, 1, 5, 1, 2, 3]), torch.rand(9) + 0.6, torch.rand(9), torch.randn(9)), 1
    )
    facts[rows[num - 1], 1:] = torch.tensor([1.0, 0.0, 0.0])
    entries = torch.tensor([2, 0, 3, 1, 0][:num])
    ids = torch.cat([torch.randperm(width)[:n] for n in entries])
    starts = torch.cat((torch.zeros(1), entries.cumsum(0))).int()
    bias = penalties.Bias(starts, ids, torch.randn(len(ids)) * 9)
    logits = torch.randn(num, width) * 4
    scratch = penalties.new_scratch(9, width, rows.device)[:limit]
    for name, given in (
        ("penalties", (facts, scratch, None)),
        ("bias", (None, None, bias)),
        ("both", (facts, scratch, bias)),
    ):
        expected = penalties.reference.penalise(logits.clone(), rows, num_tokens, token_ids, given[0], given[2])
        differ(name, penalties_kernels.penalise(logits.clone(), rows, num_tokens, token_ids, *given), expected)
    found["scratch left behind"] = found.get("scratch left behind", 0) + int(scratch.count_nonzero())

for width, num_top, at in ((5, 7, None), (700, 0, None), (1000, 6, torch.tensor([3, 0]))):
    logits = (torch.randn(4, width) * 4).round() if at is None else torch.randn(4, width) - 900
    logits[:, : width // 2] = torch.where(torch.rand(4, width // 2) > 0.5, -INF, logits[:, : width // 2])
    tokens = torch.randint(width // 2, width, (4 if at is None else 2,))
    actual = logprobs_kernels.token_logprobs(logits, tokens, num_top, at, block=256)
    expected = logprobs.reference.token_logprobs(logits, tokens, num_top, at)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[3], expected[3], rtol=1e-5, atol=1e-5)
    differ("ranks", actual[1], expected[1])
    differ("likeliest", actual[2], expected[2])
print(json.dumps(found))
