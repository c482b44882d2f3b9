"""GGUF files made of tiny Hugging Face models and tokenizers, by the format's own package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_GLOBALS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PRE = {"byte_level": "gpt-2", "byte_level_bos": "gpt-2"}


def gguf_name(name: str) -> str:
    """Of a Hugging Face tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in _GLOBALS:
        return f"{_GLOBALS[stem]}.{kind}"
    _, _, index, rest = stem.split(".", 3)
    return f"blk.{index}.{_NAMES[rest]}.{kind}"


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What the converter does to q and k of llama."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def write_model(
    model: Any,
    path: Path,
    kinds: Any = "F32",
    tokenizer: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Write the model with its matrices as `kinds` (a name, or a function of the tensor's name); what they then are."""
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    facts = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }  # fmt: skip
    for key, value in facts.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_parameters["rope_theta"])
    for key, value in {**(tokenizer or plain_tokenizer(config.vocab_size)), **(changes or {})}.items():
        _add(writer, key, value)
    held = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        kind = (kinds if isinstance(kinds, str) else kinds(name)) if tensor.dim() > 1 else "F32"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        turned = permute(tensor, heads) if heads and arch == "llama" else tensor
        held[name] = _add_tensor(writer, name, turned, kind)
        if heads and arch == "llama":
            held[name] = held[name].reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: str) -> torch.Tensor:
    qtype = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(tensor.float().numpy(), qtype)
    writer.add_tensor(gguf_name(name), data, raw_dtype=qtype)
    return torch.from_numpy(np.array(gguf.quants.dequantize(data, qtype))).view(tensor.shape)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def plain_tokenizer(size: int) -> dict[str, Any]:
    """Enough for a model that is only given ids."""
    tokens = [f"t{index}" for index in range(size)]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["t 0"]}  # fmt: skip


def tokenizer_metadata(folder: Path, kind: str, pre: str = "gpt-2") -> dict[str, Any]:
    """What a converter writes for tokenizer.json and tokenizer_config.json; `kind` is "gpt2" or "llama"."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    vocab = whole["model"]["vocab"] | {token["content"]: token["id"] for token in whole["added_tokens"]}
    added = {token["id"]: token for token in whole["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [_type(token, index, added, kind) for index, token in enumerate(tokens)]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
    }  # fmt: skip
    if kind == "gpt2":
        found["tokenizer.ggml.pre"] = pre
        found["tokenizer.ggml.merges"] = [" ".join(merge) for merge in whole["model"]["merges"]]
    else:
        found["tokenizer.ggml.scores"] = [-float(index) for index in range(len(tokens))]
        found["tokenizer.ggml.add_space_prefix"] = "Prepend" in json.dumps(whole["normalizer"])
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in vocab:
            found[f"tokenizer.ggml.{key}_token_id"] = vocab[token]
    found["tokenizer.ggml.add_bos_token"] = whole["post_processor"] is not None
    return found


def _type(token: str, index: int, added: Mapping[int, Any], kind: str) -> int:
    if token == "<unk>":
        return 2
    if index in added:
        return 3 if added[index]["special"] else 4
    return 6 if kind == "llama" and len(token) == 6 and token.startswith("<0x") else 1
