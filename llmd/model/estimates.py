"""What cannot be measured without the device, by formula: the largest step, decode graphs, what drivers take."""

from __future__ import annotations

from collections.abc import Sequence

from llmd.config import SchedulerConfig
from llmd.model.blueprint import Blueprint

CONTEXT_BYTES = 512 << 20  # of a process on a data-centre GPU: the driver's, before anything is computed
OUTSIDE_BYTES = 128 << 20  # kernels as they are loaded, handles of libraries

_WORKSPACE_BYTES = 32 << 20  # that torch gives a BLAS library for each stream; captures have one of their own
_NODE_BYTES = 10 << 10  # of device memory that a kernel takes in an instantiated graph (NVIDIA/cccl, pull request 3768)
_NODES_PER_LAYER = 12
_NODES = 32  # around the layers: inputs, embedding, logits, sampling
_COLUMN_BYTES = 64  # of a row's inputs


def activation_bytes(scheduler: SchedulerConfig, blueprint: Blueprint) -> int:
    """The largest step's: a layer's widest tensors for every token, and float32 logits for every row, twice."""
    per_row = 2 * blueprint.config.vocab_size * 4
    return scheduler.max_num_batched_tokens * _token_bytes(blueprint) + scheduler.max_num_seqs * per_row


def sampling_bytes(scheduler: SchedulerConfig, blueprint: Blueprint) -> int:
    """Of the end of a step in which every row samples: logits as the head gives them, in float32, and changed."""
    shape, itemsize = blueprint.config, blueprint.dtype.itemsize
    hidden = scheduler.max_num_batched_tokens * shape.hidden_size * itemsize
    return hidden + scheduler.max_num_seqs * shape.vocab_size * (itemsize + 4 + 4)


def graph_bytes(sizes: Sequence[int], blueprint: Blueprint) -> int:
    """Decode graphs of so many rows each: what the largest computes in, which all share, and the nodes of each."""
    if not sizes:
        return 0
    shape = blueprint.config
    memory = max(sizes) * (shape.vocab_size * 4 + _token_bytes(blueprint) + _COLUMN_BYTES) + _WORKSPACE_BYTES
    return memory + len(sizes) * (shape.num_layers * _NODES_PER_LAYER + _NODES) * _NODE_BYTES


def _token_bytes(blueprint: Blueprint) -> int:
    """A layer's widest tensors for a token."""
    shape = blueprint.config
    qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return (4 * shape.hidden_size + qkv + 3 * shape.intermediate_size) * blueprint.dtype.itemsize
