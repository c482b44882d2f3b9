"""Tiny models whose linears are written as a format has them, beside the same models with what those stand for."""

from __future__ import annotations

import json

import torch
from model.tiny_models import make_model, prompts, reference_logits
from safetensors.torch import save_file

from llmd.api.v1.testing import StepDriver, make_runner

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 96,
}  # fmt: skip


def quantized_model(
    path,
    write,
    settings,
    *,
    family="Llama",
    is_kept=lambda name: name == "lm_head",
    extra=None,
    initializer_range=0.05,
    **changes,
):
    """Save a checkpoint whose linears `write(name, weight)` wrote, and give the model of what they stand for."""
    model = make_model(family, **{**SHAPE, "initializer_range": initializer_range, **changes})
    tensors = {}
    linears = {f"{name}.weight": name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        if name not in linears or is_kept(linears[name]):
            tensors[name] = tensor.clone()
            continue
        written = write(linears[name], tensor)
        tensor.copy_(written.dense)
        tensors |= {f"{linears[name]}.{suffix}": value.contiguous() for suffix, value in written.tensors.items()}
    path.mkdir(exist_ok=True)
    save_file({**tensors, **(extra or {})}, path / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": [f"{family}ForCausalLM"], "quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config, default=str))
    return model


def agreement(path, model, **options):
    """The share of positions where the served model's most likely token is the dense model's."""
    driver = StepDriver(make_runner(path, **options))
    sequences = [driver.sequence([token % 96 for token in prompt]) for prompt in prompts(9, 30, 3, 17, 40, 1, 25, 12)]
    driver.generate(sequences, 30, chunks=(7,))
    same = total = 0
    for sequence in sequences:
        expected = reference_logits(model, sequence.tokens)[sequence.num_prompt - 1 : -1].argmax(1)
        found = torch.stack(driver.logits[sequence.row]).argmax(1)
        same, total = same + int((found == expected).sum()), total + len(expected)
    return same / total
