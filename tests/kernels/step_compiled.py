"""Compiles the Triton kernels around a step ahead of time; prints by target and kernel what is wrong."""

import json

from kernels.compiling import TARGETS, trouble

from llmd_kernels.bitmask import triton as bitmask
from llmd_kernels.embedding import triton as embedding
from llmd_kernels.logprobs import triton as logprobs
from llmd_kernels.penalties import triton as penalties
from llmd_kernels.prepare_batch import triton as prepare_batch
from llmd_kernels.sampling import triton as sampling

TYPES = {
    "x": "*fp32", "logits": "*fp32", "maxima": "*i64", "sums": "*i64", "lows": "*i64", "totals": "*i64",
    "thresholds": "*i64", "rows": "*i64", "values": "*fp64", "seeds": "*i64", "counters": "*i64", "tokens": "*i64",
    "largest": "*fp32", "num_tokens": "*i64", "token_ids": "*i32", "facts": "*fp32", "scratch": "*i32", "starts": "*i32",
    "ids": "*i64", "biases": "*fp32",
}  # fmt: skip
OF_LOGPROBS = {
    "x": "*fp32", "sums": "*fp32", "best": "*i64", "at": "*i64", "token_ids": "*i64", "logprobs": "*fp32", "ranks": "*i64",
    "top_ids": "*i64", "top_logprobs": "*fp32",
}  # fmt: skip
OF_BATCH = {
    "input_ids": "*i64", "positions": "*i64", "slots": "*i64", "token_rows": "*i64", "seq_lens": "*i32",
    "query_start": "*i32", "columns": "*i64", "token_ids": "*i32", "block_table": "*i32",
}  # fmt: skip
OF_EMBEDDING = {"out": "*bf16", "ids": "*i64", "table": "*bf16"}


def kernels():
    yield "embedding", embedding.look_up, OF_EMBEDDING, {"BLOCK": 1024}, {}
    for blocks in (False, True):
        constants = {"HAS_BLOCKS": blocks, "BLOCK": 64, "ROWS": 128}
        yield f"prepare_batch {blocks}", prepare_batch.prepare, OF_BATCH, constants, {}
        constants = {"HAS_BLOCKS": blocks, "ROWS": 128}
        yield f"decode_inputs {blocks}", prepare_batch.decode_inputs, {**OF_BATCH, "num_tokens": "*i64"}, constants, {}
    yield "bar", bitmask.bar, {"logits": "*fp32", "places": "*i64", "words": "*i32"}, {"BLOCK": 4096}, {}
    yield "hand_out", sampling.hand_out, {**TYPES, "out": "*i32"}, {"ROWS": 128}, {}
    whole = {"SPLITS": 32, "BLOCK": 1024}
    yield "maxima", sampling.maxima_of, TYPES, whole, {}
    for kind in (1, 2):
        yield f"narrow {kind}", sampling.narrow, TYPES, {"KIND": kind, "SPLITS": 32, "BLOCK": 256}, {}
    for kind in (0, 1, 2):
        yield f"tally {kind}", sampling.tally, TYPES, {"KIND": kind, **whole}, {}
    yield "pick greedy", sampling.pick, TYPES, {"DRAWS": False, "KIND": 0, **whole}, {}
    yield "pick", sampling.pick, TYPES, {"DRAWS": True, "KIND": 2, **whole}, {}
    splits, exact = {"SPLITS": 16, "BLOCK": 1024}, {"enable_fp_fusion": False}
    yield "count", penalties.count, TYPES, {"HAS_PENALTIES": True, "HAS_BIAS": True, **splits}, exact
    yield "apply", penalties.apply, TYPES, splits, exact
    yield "logprobs parts", logprobs.parts, OF_LOGPROBS, {"SPLITS": 38, "BLOCK": 4096}, {"num_warps": 8}
    joined = {"SPLITS": 38, "CANDIDATES": 4096, "BLOCK": 64}
    yield "logprobs join", logprobs.join, OF_LOGPROBS, joined, {"num_warps": 8}


print(
    json.dumps(
        {device: {name: trouble(*given, *target) for name, *given in kernels()} for device, target in TARGETS.items()}
    )
)
