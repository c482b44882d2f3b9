"""Adapters in PEFT's format with random tensors, and the base model with one merged into it, by PEFT's own formulas."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Made(NamedTuple):
    """An adapter's folder and what it should do."""

    path: Path
    merged: Any  # the base model with it


def make_adapter(
    base: Any,
    path: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: tuple[str, ...] = PROJECTIONS,
    seed: int = 0,
    bias: str = "none",
    ranks: dict[str, int] | None = None,
    alphas: dict[str, float] | None = None,
    layers: tuple[int, ...] | None = None,
    config: dict[str, Any] | None = None,
    size: float = 0.3,
) -> Made:
    """Write an adapter of `base`; `ranks` and `alphas` are patterns of single modules."""
    path.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(targets), "bias": bias,
        "use_rslora": False, "use_dora": False, "lora_bias": False, "rank_pattern": ranks or {},
        "alpha_pattern": alphas or {}, "layers_to_transform": list(layers) if layers else None, "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny", "init_lora_weights": True, "fan_in_fan_out": False, "modules_to_save": None,
        **(config or {}),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    merged, tensors = copy.deepcopy(base), {}
    untie(merged)
    for name, module in merged.named_modules():
        last = name.rpartition(".")[2]
        in_layer = layers is None or any(f"layers.{layer}." in name for layer in layers)
        if last in targets and in_layer:
            tensors.update(_change(name, last, module, settings, generator, size))
    save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return Made(path, merged)


WEIGHTS = "adapter_model.safetensors"


def untie(model: Any) -> None:
    """Give the head a table of its own: a delta of one is none of the other."""
    head = model.get_output_embeddings()
    if head is None:
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


@torch.no_grad()
def _change(
    name: str, last: str, module: Any, settings: dict[str, Any], generator: torch.Generator, size: float
) -> dict[str, torch.Tensor]:
    """The tensors of one module, which is changed as they say."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * size

    rank = settings["rank_pattern"].get(last, settings["r"])
    alpha = settings["alpha_pattern"].get(last, settings["lora_alpha"])
    scaling = alpha / math.sqrt(rank) if settings["use_rslora"] else alpha / rank
    is_embedding = isinstance(module, torch.nn.Embedding)
    weight = module.weight.T if is_embedding else module.weight  # [out, in]
    a, b = draw(rank, weight.shape[1]), draw(weight.shape[0], rank) / rank
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    tensors = {f"{name}.{names[0]}": a, f"{name}.{names[1]}": b}
    new = weight + scaling * b @ a
    change = torch.ones(weight.shape[0])
    if settings["use_dora"]:
        magnitude = weight.norm(dim=1) * (1 + draw(weight.shape[0]).abs())
        change = magnitude / new.norm(dim=1)
        tensors[f"{name}.lora_magnitude_vector"] = magnitude
    new = new * change.unsqueeze(1)
    module.weight = torch.nn.Parameter((new.T if is_embedding else new).contiguous())
    if settings["bias"] != "none" and getattr(module, "bias", None) is not None:
        module.bias.copy_(draw(*module.bias.shape))
        tensors[f"{name}.base_layer.bias"] = module.bias.detach().clone()
    if settings["lora_bias"]:
        extra = draw(weight.shape[0])
        tensors[f"{name}.lora_B.bias"] = extra
        base_bias = module.bias if module.bias is not None else torch.zeros_like(extra)
        module.bias = torch.nn.Parameter(base_bias + scaling * extra * change)
    return tensors
