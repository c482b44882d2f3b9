"""Compiles the Triton kernels of attention and of one token each ahead of time; prints by target and kernel what is wrong.

Every kernel must fit the device's shared memory and spill at most MAX_SPILLS bytes a thread.
"""

import json

from kernels.compiling import TARGETS, trouble

from llmd_kernels.paged_attention import table
from llmd_kernels.paged_attention import triton as attention
from llmd_kernels.rms_norm import triton as norm
from llmd_kernels.rotary import triton as rotary
from llmd_kernels.silu_mul import triton as activation
from llmd_kernels.store_kv import triton as store

POINTERS = {
    "out": "*bf16", "q": "*bf16", "k": "*bf16", "v": "*bf16", "x": "*bf16", "residual": "*bf16", "weight": "*bf16",
    "q_weight": "*bf16", "k_weight": "*bf16", "block_table": "*i32", "rows": "*i64", "query_start": "*i32",
    "seq_lens": "*i32", "sinks": "*fp32", "slopes": "*fp32", "tops": "*fp32", "totals": "*fp32", "parts": "*fp32",
    "positions": "*i64", "slots": "*i64", "cos_sin": "*fp32",
}  # fmt: skip
FLOATS = {"scale", "soft_cap", "eps"}
CACHES = {0: ("*bf16", "*bf16"), 1: ("*i8", "*i16"), 2: ("*u8", "*i16")}  # by kind: data, scales
# strides and sizes that are multiples of 16 for common models: loads are as wide as they will be
ALIGNED = {
    "q_stride", "k_stride", "v_stride", "v_offset", "block_stride", "token_stride", "scale_v_offset", "scale_stride",
    "head_dim", "dim", "outer_stride", "inner_stride",
}  # fmt: skip
PLAIN = {"HAS_CAP": False, "HAS_SINKS": False, "HAS_ALIBI": False}
EVERYTHING = {"HAS_CAP": True, "HAS_SINKS": True, "HAS_ALIBI": True}


def attention_kernels(device):
    """Decode and prefill by the tables: head dim, query heads a KV head, kind of cache, what else."""
    shapes = [(64, 7, 0, PLAIN), (128, 8, 2, EVERYTHING)]
    if device == "sm_90":
        shapes += [(128, 4, 1, PLAIN), (256, 2, 0, PLAIN)]
    for dim, group, kind, extras in shapes:
        common = {"GROUP": group, "KIND": kind, "BLOCK_SIZE": 16, "BLOCK_D": dim, **extras}
        for is_prefill in (False, True):
            shape = table.tiles(device, dim, is_prefill=is_prefill)
            kernel = attention.prefill if is_prefill else attention.decode
            own = {"BLOCK_Q": shape.block_m // group} if is_prefill else {"SPLITS": 8}
            tiles = {"BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n}
            options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
            yield f"{kernel.fn.__name__} {dim} {kind}", kernel, {**common, **own, **tiles}, options


def other_kernels():
    yield "join", attention.join, {"SPLITS": 32, "BLOCK_D": 128}, {}
    yield "rotary", rotary.turn, {"BLOCK": 64}, {"num_warps": 1}
    yield "add_rms_norm", norm.normalise, {"ADD": True, "BLOCK": 8192}, {"num_warps": 8}
    yield "gelu_mul", activation.gate_up, {"KIND": 1, "BLOCK": 1024}, {}
    constants = {"HAS_NORM": True, "TURNS": True, "KIND": 2, "BLOCK_SIZE": 16, "BLOCK_D": 128}
    yield "rotary_store_kv 2", store.rotate_and_store, constants, {"num_warps": 1}


def types_of(kernel, constants):
    types = {**POINTERS, **dict.fromkeys(FLOATS, "fp32")}
    types["cache"], types["scales"] = CACHES[constants.get("KIND", 0)]
    return {**types, "out": "*fp32"} if kernel is attention.decode else types


print(
    json.dumps(
        {
            device: {
                name: trouble(kernel, types_of(kernel, constants), constants, options, *target, multiples=ALIGNED)
                for name, kernel, constants, options in (*attention_kernels(device), *other_kernels())
            }
            for device, target in TARGETS.items()
        }
    )
)
