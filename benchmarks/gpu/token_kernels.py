"""Kernels over tokens one by one: norms, activations, heads turned and stored, rows of tables, a step's inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.setting import Setting, Work
from llmd_kernels.copy_blocks import copy_blocks
from llmd_kernels.copy_blocks import reference as blocks_reference
from llmd_kernels.embedding import embedding
from llmd_kernels.prepare_batch import DecodeInputs, new_inputs, prepare_batch, prepare_decode
from llmd_kernels.prepare_batch import reference as batch_reference
from llmd_kernels.rms_norm import add_rms_norm, rms_norm
from llmd_kernels.rms_norm import reference as norm_reference
from llmd_kernels.rotary import reference as rotary_reference
from llmd_kernels.rotary import rotary
from llmd_kernels.silu_mul import silu_mul
from llmd_kernels.store_kv import reference as store_reference
from llmd_kernels.store_kv import rotary_store_kv

_BLOCK_SIZE = 16


def _random(setting: Setting, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=setting.device).bfloat16()


def _norm(wanted: int) -> Callable[[Setting, dict[str, Any]], Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        num_tokens = min(wanted, 20) if setting.is_tiny else wanted
        dim = config["hidden_size"]
        x, residual, weight = _random(setting, num_tokens, dim), _random(setting, num_tokens, dim), _random(setting, dim)
        return Work(
            lambda: add_rms_norm(x, residual, weight, 1e-6),
            lambda: norm_reference.add_rms_norm(x, residual, weight, 1e-6),
            8 * x.numel(),
        )

    return make


def _plain_norm(setting: Setting, config: dict[str, Any]) -> Work:
    num_tokens, dim = 20 if setting.is_tiny else 64, config["hidden_size"]
    x, weight = _random(setting, num_tokens, dim), _random(setting, dim)
    return Work(lambda: rms_norm(x, weight, 1e-6), lambda: norm_reference.rms_norm(x, weight, 1e-6), 4 * x.numel())


def _activation(wanted: int) -> Callable[[Setting, dict[str, Any]], Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        num_tokens = min(wanted, 20) if setting.is_tiny else wanted
        x = _random(setting, num_tokens, 2 * config["intermediate_size"])
        half = config["intermediate_size"]
        return Work(lambda: silu_mul(x), lambda: F.silu(x[:, :half]) * x[:, half:], 3 * x.numel())

    return make


def _store(wanted: int) -> Callable[[Setting, dict[str, Any]], Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        num_tokens = min(wanted, 20) if setting.is_tiny else wanted
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        dim = config["hidden_size"] // heads
        qkv = _random(setting, num_tokens, heads + 2 * kv_heads, dim)
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        blocks = -(-num_tokens // _BLOCK_SIZE)
        kv = torch.zeros(blocks, 2, _BLOCK_SIZE, kv_heads, dim, dtype=torch.bfloat16, device=setting.device)
        positions = torch.arange(num_tokens, device=setting.device) % 4096
        slots, table = (
            torch.randperm(blocks * _BLOCK_SIZE, device=setting.device),
            torch.randn(4096, dim, device=setting.device),
        )
        slots = slots[:num_tokens]

        def plain() -> None:
            rotary_reference.rotary(q, k, positions, table)
            store_reference.store_kv(k, v, kv, slots)

        return Work(
            lambda: rotary_store_kv(q, k, v, kv, positions, slots, table), plain, 4 * qkv.numel() + 4 * num_tokens * dim
        )

    return make


def _embedding(setting: Setting, config: dict[str, Any]) -> Work:
    table = _random(setting, config["vocab_size"], config["hidden_size"])
    ids = torch.randint(config["vocab_size"], (20 if setting.is_tiny else 8192,), device=setting.device)
    return Work(lambda: embedding(ids, table), lambda: F.embedding(ids, table), 4 * len(ids) * config["hidden_size"])


def _rotary(setting: Setting, config: dict[str, Any]) -> Work:
    num_tokens = 20 if setting.is_tiny else 8192
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // heads
    qkv = _random(setting, num_tokens, heads + 2 * kv_heads, dim)
    q, k = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    positions, table = torch.arange(num_tokens, device=setting.device) % 4096, torch.randn(4096, dim, device=setting.device)
    call = (q, k, positions, table)
    return Work(lambda: rotary(*call), lambda: rotary_reference.rotary(*call), 4 * num_tokens * (heads + kv_heads) * dim)


def _inputs(counts: list[int], start: int) -> Callable[[Setting, dict[str, Any]], Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        del config
        num_rows, num_tokens, device = len(counts), sum(counts), setting.device
        columns = torch.tensor([list(range(num_rows)), [start] * num_rows, counts]).to(device)
        token_ids = torch.ones(num_rows, start + max(counts) + 1, dtype=torch.int32, device=device)
        blocks = torch.ones(num_rows, token_ids.shape[1] // _BLOCK_SIZE + 1, dtype=torch.int32, device=device)
        call = (new_inputs(num_tokens, num_rows, device), columns, token_ids, blocks, _BLOCK_SIZE)
        return Work(
            lambda: prepare_batch(*call), lambda: batch_reference.prepare_batch(*call, 0), 40 * num_tokens, waits=True
        )

    return make


def _decode_inputs(setting: Setting, config: dict[str, Any]) -> Work:
    del config
    num_rows, device = 5 if setting.is_tiny else 256, setting.device
    columns = torch.tensor([list(range(num_rows)), [1000] * num_rows, [-1] * num_rows]).to(device)
    sizes = ((num_rows, torch.int64), (num_rows, torch.int64), (num_rows, torch.int32), (num_rows, torch.int64))
    out = DecodeInputs(*(torch.empty(size, dtype=dtype, device=device) for size, dtype in sizes))
    token_ids = torch.ones(num_rows, 1024, dtype=torch.int32, device=device)
    blocks = torch.ones(num_rows, 65, dtype=torch.int32, device=device)
    call = (out, columns, token_ids, blocks, _BLOCK_SIZE)
    return Work(lambda: prepare_decode(*call), lambda: batch_reference.prepare_decode(*call), 60 * num_rows, waits=True)


def _blocks(setting: Setting, config: dict[str, Any]) -> Work:
    """Half of a pool's blocks onto the other half."""
    num_blocks, layers = (8, 2) if setting.is_tiny else (512, config["num_hidden_layers"])
    dim = config["hidden_size"] // config["num_attention_heads"]
    pool = _random(setting, num_blocks, layers, 2, _BLOCK_SIZE, config["num_key_value_heads"], dim)
    sources, targets = torch.randperm(num_blocks, device=setting.device).view(2, -1)
    return Work(
        lambda: copy_blocks(pool, sources, targets),
        lambda: blocks_reference.copy_blocks(pool, sources, targets),
        pool.nbytes,
    )


MAKE = {
    "add_rms_norm, 64 tokens": _norm(64),
    "add_rms_norm, 8192 tokens": _norm(8192),
    "silu_mul, 64 tokens": _activation(64),
    "silu_mul, 8192 tokens": _activation(8192),
    "rotary_store_kv, 64 tokens": _store(64),
    "rotary_store_kv, 8192 tokens": _store(8192),
    "embedding": _embedding,
    "copy_blocks, 256": _blocks,
    "rotary, 8192 tokens": _rotary,
    "rms_norm, 64 tokens": _plain_norm,
    "prepare_decode, 256 rows": _decode_inputs,
    "prepare_batch, 256 decoding rows": _inputs([1] * 256, 1000),
    "prepare_batch, 8192 tokens": _inputs([7937] + [1] * 255, 100),
}
