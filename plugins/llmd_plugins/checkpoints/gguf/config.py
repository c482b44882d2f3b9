"""GGUF's metadata as a Hugging Face config.json, and the names of its tensors in that world."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmd.api.v1 import ModelError
from llmd_plugins.checkpoints.gguf.header import FLOATS, GgufHeader

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_SPARE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# what Llama 3.1 and 3.2 were published with; the file has only the divisors that follow from it
_LLAMA3_ROPES = (
    {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
)


def hugging_face_name(name: str) -> str | None:
    """A tensor's name in a Hugging Face checkpoint; None for what no architecture here has."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[stem]}.{kind}"
    block, _, rest = stem.removeprefix("blk.").partition(".")
    if not stem.startswith("blk.") or not block.isdecimal() or rest not in _BLOCK_NAMES:
        return None
    return f"model.layers.{int(block)}.{_BLOCK_NAMES[rest]}.{kind}"


class Metadata:
    """Typed reads whose errors name the key; `arch` keys come with the architecture's name before them."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        arch = raw.get("general.architecture")
        if arch not in ARCHITECTURES:
            raise ModelError(
                f"general.architecture {arch!r} of the GGUF file is not known; known are {', '.join(ARCHITECTURES)}"
            )
        self.arch: str = arch

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; for a list by layer, the one that all layers share."""
        value = self.raw.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(
                f"{self.arch}.{key} of the GGUF file must be one whole number for all layers, got {value!r:.80}"
            )
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self.raw.get(f"{self.arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{self.arch}.{key} of the GGUF file must be a number, got {value!r:.80}")
        return float(f"{value:.7g}")  # a float32: as it was written

    def has(self, key: str) -> bool:
        """Whether the key is there and not 0."""
        return bool(self.raw.get(f"{self.arch}.{key}"))


def make_config(header: GgufHeader, rope_divisors: list[float] | None) -> dict[str, Any]:
    """config.json. `rope_divisors` is the tensor rope_freqs. Raises ModelError for what is missing, wrong or not served."""
    metadata = Metadata(header.metadata)
    if metadata.has("expert_count"):
        raise ModelError(f"the GGUF file holds a mixture of experts ({metadata.arch}), which is not served yet")
    unknown = [name for name in header.tensors if hugging_face_name(name) is None and name not in _SPARE_TENSORS]
    if unknown:
        raise ModelError(f"the GGUF file holds tensor {unknown[0]}, for which {metadata.arch} has no place")
    if "token_embd.weight" not in header.tensors:
        raise ModelError("the GGUF file lacks tensor token_embd.weight")
    class_name, model_type = ARCHITECTURES[metadata.arch]
    num_heads = metadata.integer("attention.head_count")
    hidden_size = metadata.integer("embedding_length")
    head_dim = metadata.integer(
        "attention.key_length", metadata.integer("rope.dimension_count", hidden_size // max(1, num_heads))
    )
    context = metadata.integer("context_length")
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_parameters": _rope(metadata, context, head_dim, rope_divisors),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "dtype": _dtype(header),
    }
    if metadata.has("attention.sliding_window"):
        config["sliding_window"] = metadata.integer("attention.sliding_window")
    config |= _token_ids(header.metadata)
    types = quantized_modules(header)
    return config | ({"quantization_config": {"quant_method": "gguf", "types": types}} if types else {})


def quantized_modules(header: GgufHeader) -> dict[str, str]:
    """Linears that are kept as they are in the file: module → type. The table of tokens is not: it becomes dense."""
    return {
        str(hugging_face_name(name)).removesuffix(".weight"): entry.type.name
        for name, entry in header.tensors.items()
        if entry.type.name not in FLOATS and len(entry.shape) == 2 and name != "token_embd.weight"
    }


def eos_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """What ends an answer: of the text, of the turn, of the message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return list(dict.fromkeys(value for value in found if isinstance(value, int)))


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    bos, eos = metadata.get("tokenizer.ggml.bos_token_id"), eos_token_ids(metadata)
    return ({"bos_token_id": bos} if isinstance(bos, int) else {}) | ({"eos_token_id": eos} if eos else {})


def _dtype(header: GgufHeader) -> str:
    """What most of the floats of matrices are; bfloat16 beside quantized ones."""
    kinds = {entry.type.name for entry in header.tensors.values() if len(entry.shape) > 1}
    return {"F32": "float32", "F16": "float16"}.get(*kinds, "bfloat16") if len(kinds) == 1 else "bfloat16"  # type: ignore[call-overload]


def _rope(metadata: Metadata, context: int, head_dim: int, divisors: list[float] | None) -> dict[str, Any]:
    theta = metadata.number("rope.freq_base", 10000.0)
    kind = metadata.raw.get(f"{metadata.arch}.rope.scaling.type", "none")
    if divisors is not None:
        return {"rope_theta": theta, "rope_type": "llama3", **_llama3_rope(theta, head_dim, divisors)}
    if kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    factor = metadata.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ModelError(f"{metadata.arch}.rope.scaling.type of the GGUF file must be none, linear or yarn, got {kind!r}")
    original = metadata.integer("rope.scaling.original_context_length", int(context / factor))
    return {"rope_theta": theta, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


def _llama3_rope(theta: float, head_dim: int, divisors: list[float]) -> dict[str, float]:
    """The settings whose divisors these are. Raises ModelError when none of those known gives them."""
    for settings in _LLAMA3_ROPES:
        wanted = llama3_divisors(theta, head_dim, **settings)
        if len(wanted) == len(divisors) and all(
            math.isclose(a, b, rel_tol=1e-3) for a, b in zip(wanted, divisors, strict=True)
        ):
            return settings
    raise ModelError("tensor rope_freqs.weight of the GGUF file holds divisors that are not Llama 3.1's or 3.2's")


def llama3_divisors(
    theta: float,
    head_dim: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> list[float]:
    """By what each frequency is divided: long waves by `factor`, short ones not, those between in part."""
    divisors = []
    for index in range(head_dim // 2):
        turns = original_max_position_embeddings * theta ** (-2 * index / head_dim) / (2 * math.pi)
        share = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        share = min(1.0, max(0.0, share))
        divisors.append(1 / ((1 - share) / factor + share))
    return divisors
