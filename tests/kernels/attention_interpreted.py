"""Prints the largest error of the Triton attention kernels in the interpreter, by case, relative to the largest number."""

import json

import torch
from kernels.attention_calls import make_call

from llmd_kernels.paged_attention import reference, table, triton

LONG = ([700, 3, 1000, 1, 90], [1, 1, 1, 1, 1])  # 11 + 1 + 16 + 1 + 2 tiles, a program's least is two
DECODE, MIXED = ([5, 130, 77, 1], [1, 1, 1, 1]), ([5, 150, 77, 9], [5, 1, 70, 1])
F16, I8, F8 = torch.float16, torch.int8, torch.float8_e4m3fn
ALL = {"soft_cap": 2.0, "alibi_slopes": torch.full((6,), 0.1), "sinks": torch.arange(6) - 2.0, "window": 21}
# rows, (heads, KV heads, head dim, block size), dtypes of q and cache, programs of decode, what else
CASES = {
    "decode, odd group": (DECODE, (7, 1, 64, 16), torch.float32, None, 1, {}),
    "decode in splits": (DECODE, (6, 2, 20, 3), torch.float32, None, 4, {}),
    "decode, windows in splits": (DECODE, (6, 2, 20, 3), torch.float32, None, 2, {"window": 17}),
    "decode, everything": (DECODE, (6, 2, 20, 3), torch.float32, None, 4, ALL),
    "decode of half, 80 dims": (DECODE, (4, 4, 80, 16), F16, None, 2, {}),
    "decode, MQA of 40, 96 dims": (DECODE, (40, 1, 96, 16), torch.float32, None, 2, {}),
    "decode, 256 dims": (([70], [1]), (2, 1, 256, 16), torch.float32, None, 2, {}),
    "decode, int8": (DECODE, (6, 2, 20, 3), torch.float32, I8, 4, {}),
    "decode, fp8": (DECODE, (6, 2, 20, 3), torch.float32, F8, 4, ALL),
    "decode, int8 of half": (DECODE, (6, 2, 64, 16), F16, I8, 1, {}),
    "long rows, whole": (LONG, (4, 2, 16, 16), torch.float32, None, 1, {}),
    "long rows, in two": (LONG, (4, 2, 16, 16), torch.float32, None, 2, {}),
    "long rows, in parts": (LONG, (4, 2, 16, 16), torch.float32, None, 7, {"window": 900}),
    "long rows, more programs than work": (LONG, (4, 2, 16, 16), torch.float32, None, 90, {}),
    "long rows, sinks of half": (LONG, (4, 2, 16, 16), F16, None, 9, {"sinks": torch.arange(4) - 2.0}),
    "long rows, fp8 of half": (LONG, (4, 2, 16, 16), F16, F8, 9, {}),
    "mixed": (MIXED, (6, 2, 20, 3), torch.float32, None, 2, {}),
    "mixed, everything": (MIXED, (6, 2, 20, 3), torch.float32, None, 2, ALL),
    "mixed of half, odd group": (MIXED, (7, 1, 64, 16), F16, None, 1, {"window": 33}),
    "prefill": (([40, 3], [40, 2]), (3, 3, 96, 5), torch.float32, None, 1, {}),
    "prefill, MQA of 40, fp8": (([50], [13]), (40, 1, 80, 16), torch.float32, F8, 1, {}),
    "mixed, int8": (MIXED, (6, 2, 20, 3), torch.float32, I8, 2, {"window": 40}),
    "a cache of another dtype": (MIXED, (6, 2, 20, 3), F16, torch.float32, 2, {}),
}
IN_COLUMNS = ("decode, everything", "decode, int8 of half", "long rows, in parts", "long rows, fp8 of half", "mixed")
table.JOINED = 512  # so that what is joined comes in several goes


def error_of(rows, heads, dtype, kv_dtype, programs, extras):
    call = make_call(*rows, *heads, dtype, kv_dtype, **extras)
    actual = triton.paged_attention(call, programs, "gfx942").double()
    expected = reference.paged_attention(call).double()
    assert not actual.isnan().any()
    assert not triton._counters(call.q.device).any()
    return float((actual - expected).abs().max() / expected.abs().max())


errors = {name: error_of(*case) for name, case in CASES.items()}
triton.ONE_BY_ONE = None  # heads as columns, as decode has them where it reads words
print(json.dumps({**errors, **{f"{name}, in columns": error_of(*CASES[name]) for name in IN_COLUMNS}}))
