"""Compiles the Triton kernels of attention and of one token each as their wrappers launch them; prints by target and kernel
what is wrong and, where there is a disassembler, what sm_90's machine code is like.

Every kernel must fit the device's shared memory and spill at most MAX_SPILLS bytes a thread.
"""

import json

import torch
from kernels.compiling import TARGETS, TOOLS, facts, launches, unfit

from llmd_kernels.embedding import triton as embedding_kernels
from llmd_kernels.paged_attention import AttentionCall
from llmd_kernels.paged_attention import triton as attention
from llmd_kernels.quantized_kv import half_bytes, view_quantized
from llmd_kernels.rms_norm import triton as norm_kernels
from llmd_kernels.rotary import triton as rotary_kernels
from llmd_kernels.silu_mul import triton as activation_kernels
from llmd_kernels.store_kv import triton as store_kernels

META, BF16, INT8, FP8 = torch.device("meta"), torch.bfloat16, torch.int8, torch.float8_e4m3fn
LAYERS, BLOCK_SIZE = 24, 16
SHAPES = {"0.5B": (14, 2, 64), "7B": (28, 4, 128), "8B": (32, 8, 128), "256": (16, 8, 256)}


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device=META)


def cache(kv_heads, dim, dtype):
    """A layer's view of a pool."""
    shape = (2, BLOCK_SIZE, kv_heads, dim)
    if dtype not in (INT8, FP8):
        return empty(9, LAYERS, *shape, dtype=dtype)[:, 1]
    return view_quantized(empty(9, LAYERS, 2, half_bytes(shape), dtype=torch.uint8)[:, 1], shape, dtype)


def heads_of(shape, num_tokens):
    """q, k and v side by side, as one product leaves them."""
    heads, kv_heads, dim = shape
    qkv = empty(num_tokens, heads + 2 * kv_heads, dim)
    return qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]


def call(shape, dtype, count, **extras):
    """64 rows of one token, or two of `count`."""
    rows = 64 if count == 1 else 2
    given = {name: empty(shape[0], dtype=torch.float32) if tensor else value for name, (tensor, value) in extras.items()}
    return AttentionCall(
        heads_of(shape, rows * count)[0], cache(*shape[1:], dtype), empty(257, 512, dtype=torch.int32),
        empty(rows, dtype=torch.int64), empty(rows + 1, dtype=torch.int32), empty(rows, dtype=torch.int32), count,
        shape[2] ** -0.5, **given,
    )  # fmt: skip


EVERYTHING = {"window": (False, 4096), "soft_cap": (False, 30.0), "sinks": (True, None), "alibi_slopes": (True, None)}


def attention_cases(device):
    """Decode and, launched by the same call of rows with more tokens, prefill: shape, dtype of the cache, what else."""
    yield "0.5B", BF16, {}
    yield "8B", FP8, EVERYTHING
    if device == "sm_90":
        yield from (("7B", INT8, {}), ("8B", BF16, {}), ("256", BF16, {}))


def attend(device):
    """By name, what attention launches."""
    target = TARGETS[device][0]
    for name, dtype, extras in attention_cases(device):
        with launches(target) as made:
            attention.paged_attention(call(SHAPES[name], dtype, 512, **extras), device=device)
        yield from ((f"{launch.name} {name} {dtype} {len(extras)}", launch) for launch in made)


def of_one_token(device):
    """By name, what the other kernels launch."""
    with launches(TARGETS[device][0]) as made:
        for name, dtype in (("0.5B", BF16), ("8B", FP8), ("7B", INT8)):
            (q, k, v), slots = heads_of(SHAPES[name], 64), empty(64, dtype=torch.int64)
            dim, kv = q.shape[2], cache(*SHAPES[name][1:], dtype)
            table, weight = empty(4096, dim, dtype=torch.float32), empty(dim)
            norms = (weight, weight, 1e-6) if dtype == FP8 else None
            store_kernels.rotary_store_kv(q, k, v, kv, slots, slots, table, norms)
        store_kernels.store_kv(k, v, kv, slots)
        rotary_kernels.rotary(q, k, slots, table[:, :64])
        norm_kernels.rms_norm(empty(64, 896), empty(896), 1e-6)
        norm_kernels.add_rms_norm(empty(64, 8192), empty(64, 8192), empty(8192), 1e-6)
        for kind in (activation_kernels.SILU, activation_kernels.GELU):
            activation_kernels.activate(empty(64, 2 * 4864), kind)
        embedding_kernels.embedding(empty(64, dtype=torch.int64), empty(1024, 896))
    yield from ((f"{launch.name} {index}", launch) for index, launch in enumerate(made))


def all_kernels(device):
    return {**dict(attend(device)), **dict(of_one_token(device))}


compiled = {device: all_kernels(device) for device in TARGETS}
wrong = {
    device: {name: unfit(launch.built, *TARGETS[device]) for name, launch in kernels.items()}
    for device, kernels in compiled.items()
}
code = {name: facts(launch.built) for name, launch in compiled["sm_90"].items()} if (TOOLS / "nvdisasm").exists() else None
print(json.dumps({"wrong": wrong, "code": code}))
