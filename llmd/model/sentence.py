"""What sentence-transformers' modules make of a pooled vector, with their weights: linear layers and activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmd.errors import ModelError
from llmd.sentence_files import DenseModule, read_modules

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": F.relu,
    "GELU": F.gelu,
    "Sigmoid": torch.sigmoid,
    "SiLU": F.silu,
}
_FILE = "model.safetensors"


class Dense(NamedTuple):
    """activation(weight · x + bias) in float32."""

    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None  # [out_features]
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """[…, in_features] → […, out_features]."""
        return self.activation(F.linear(x, self.weight, self.bias))


class Tail(NamedTuple):
    """What follows the hidden states; `pooling` is None where no file says so."""

    pooling: str | None = None
    dense: tuple[Dense, ...] = ()

    def size(self, hidden_size: int) -> int:
        """How long vectors are that were pooled from this hidden size."""
        return self.dense[-1].weight.shape[0] if self.dense else hidden_size


def read_tail(folder: Path, hidden_size: int, device: torch.device) -> Tail:
    """The modules of a model's folder. Raises ModelError for files and shapes that do not fit."""
    modules = read_modules(folder)
    if modules.dense and modules.dense[0].in_features != hidden_size:
        first = modules.dense[0]
        raise ModelError(
            f"{folder.name}/{first.path}/config.json: in_features must be the model's hidden size, {hidden_size}, "
            f"got {first.in_features}"
        )
    return Tail(modules.pooling, tuple(_load(folder, module, device) for module in modules.dense))


def _load(folder: Path, module: DenseModule, device: torch.device) -> Dense:
    path, where = folder / module.path / _FILE, f"{folder.name}/{module.path}/{_FILE}"
    if not path.is_file():
        others = "; pytorch_model.bin is a pickle and is never read: convert it" if _has_pickle(path.parent) else ""
        raise ModelError(f"{where} is missing{others}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{where} cannot be read ({error}): download it again") from error
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (module.out_features, module.in_features)}
    if module.has_bias:
        shapes["linear.bias"] = (module.out_features,)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise ModelError(f"{where} must hold {_shown(shapes)} as config.json says, it holds {_shown(found)}")
    weights = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    return Dense(weights["linear.weight"], weights.get("linear.bias"), _ACTIVATIONS[module.activation])


def _has_pickle(folder: Path) -> bool:
    return (folder / "pytorch_model.bin").is_file()


def _shown(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())) or "nothing"
