"""Tiny random models in Hugging Face's own classes, with odd head counts, saved as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 60, "intermediate_size": 77, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip


def make_model(family: str, *, config_family: str | None = None, **changes: Any) -> Any:
    """`family` as in LlamaForCausalLM, without the ending; equal calls give equal weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{config_family or family}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # the initial zeros and ones would hide a bias or norm that is not applied
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save_model(model: Any, path: Path, **kwargs: Any) -> Path:
    """Write config.json and weights."""
    model.save_pretrained(path, **kwargs)
    return path


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def reference_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """[T, V] of a sequence alone."""
    return model(torch.tensor([token_ids])).logits[0]


def reference_generate(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Prompt and greedy continuation by `generate`."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    return output[0].tolist()
