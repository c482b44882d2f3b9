"""A head start: initial weights whose first two layers can already copy.

Most of what the demo model does is copying: a name into JSON, a word into a sorted list, a city into a call. Left to chance,
the two attention heads that copy had not appeared after 700,000 tokens. So they are put there, as studies of trained models
describe them, and training goes on from there:

    layer 0   looks at the token before and notes, in a subspace of its own, which one it is
    layer 1   looks for places whose noted token is the current one, and proposes what stands there
"""

from typing import Any

import torch
from torch import Tensor

_NUM_SHARP = 4  # rotary pairs that turn fast enough to tell neighbours apart
_FIRST_STEADY = 10  # rotary pairs from here on hardly turn over a sentence
_COMMON = 0.5  # the part of every embedding that says no more than "a token"
_NOTE_GAIN, _MATCH_GAIN, _COPY_GAIN = 0.4, 3.0, 1.5


def plant_copying(model: Any) -> None:
    """Sets embeddings and the first two layers' attention of a fresh Llama model; other attention and MLPs start silent."""
    config = model.config
    basis = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size))[0].T
    head_dim, half = config.head_dim, config.head_dim // 2
    num_steady = 2 * (half - _FIRST_STEADY)
    common, identity, note, copied = basis[0], basis[1:], basis[1 + num_steady :], basis[1 + 2 * num_steady :]
    embeddings = model.model.embed_tokens.weight.data
    embeddings.normal_(std=config.hidden_size**-0.5).add_(_COMMON * common)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    _plant_previous(model.model.layers[0].self_attn, common, identity[:num_steady], note[:num_steady], config)
    for kv_head in range(config.num_key_value_heads):
        part = copied[kv_head * head_dim : (kv_head + 1) * head_dim]
        _plant_match(model.model.layers[1].self_attn, identity[:num_steady], note[:num_steady], part, kv_head, config)


def _plant_previous(attention: Any, common: Tensor, identity: Tensor, note: Tensor, config: Any) -> None:
    half = config.head_dim // 2
    sharp = torch.arange(_NUM_SHARP)
    angles = config.rope_parameters["rope_theta"] ** (-sharp / half)
    query, key = attention.q_proj.weight.data, attention.k_proj.weight.data
    query[: config.head_dim], key[: config.head_dim] = 0, 0
    key[sharp] = common
    # Turned back by one position, the query meets the key of the token before.
    query[sharp], query[half + sharp] = torch.outer(angles.cos(), common), torch.outer(-angles.sin(), common)
    attention.v_proj.weight.data[: len(identity)] = identity
    attention.o_proj.weight.data[:, : len(note)] = _NOTE_GAIN * note.T


def _plant_match(attention: Any, identity: Tensor, note: Tensor, copied: Tensor, kv_head: int, config: Any) -> None:
    head_dim, half = config.head_dim, config.head_dim // 2
    pairs = torch.arange(_FIRST_STEADY, half)
    steady = torch.cat([pairs, half + pairs])
    head = kv_head * config.num_attention_heads // config.num_key_value_heads
    query, key = attention.q_proj.weight.data, attention.k_proj.weight.data
    query[head * head_dim : (head + 1) * head_dim], key[kv_head * head_dim : (kv_head + 1) * head_dim] = 0, 0
    query[head * head_dim + steady] = _MATCH_GAIN * identity
    key[kv_head * head_dim + steady] = _MATCH_GAIN * note
    attention.v_proj.weight.data[kv_head * head_dim : kv_head * head_dim + len(copied)] = copied
    attention.o_proj.weight.data[:, head * head_dim : head * head_dim + len(copied)] = _COPY_GAIN * copied.T
