"""The shapes of the models that are measured, from their published configs; weights are random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _QWEN2 | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": _QWEN2 | {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
_TINY = {
    "vocab_size": 999, "hidden_size": 56, "intermediate_size": 120, "num_hidden_layers": 2, "num_attention_heads": 7,
    "num_key_value_heads": 1,
}  # fmt: skip


def shape(model: str, *, is_tiny: bool) -> dict[str, Any]:
    """A model's config, or one of the same kind that a test can run."""
    return MODELS[model] | (_TINY if is_tiny else {})


def write_model(folder: Path, model: str, *, is_tiny: bool) -> dict[str, Any]:
    """A checkpoint without weights: its config and a tokenizer of numbered words."""
    config = shape(model, is_tiny=is_tiny)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = {f"t{index}": index for index in range(config["vocab_size"])}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"}}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | parts), encoding="utf-8")
    return config
