"""The model to quantize: transformers' modules without memory, and their weights, read when a layer's turn comes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmd.api.v1 import ModelError

_INDEX = "model.safetensors.index.json"


class Source:
    """Weights by their names, and the decoder's layers."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.folder, self.device = folder, device
        self.config_text = (folder / "config.json").read_text(encoding="utf-8")
        if "quantization_config" in json.loads(self.config_text):
            raise ModelError(f"{folder.name} is quantized already: quantization_config is in its config.json")
        self.config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            self.module = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa")
        self.decoder: Any = getattr(self.module, "model", None)
        if not all(hasattr(self.decoder, name) for name in ("embed_tokens", "layers", "rotary_emb")):
            raise ModelError(f"{self.module.__class__.__name__} is no decoder of layers as Llama and Qwen are")
        self._files = _files_by_name(folder)

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return sorted(self._files)

    def num_bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    def read(self, name: str) -> Tensor:
        """A tensor, on the device."""
        from safetensors import safe_open

        if name not in self._files:
            raise ModelError(f"the checkpoint lacks tensor {name}")
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.to(self.device)

    def linears(self) -> dict[str, nn.Linear]:
        """The linears of the layers, by name: what is quantized. The head is not."""
        return {
            name: module for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear) and name.startswith("model.layers.")
        }  # fmt: skip

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Each layer with its weights in float32, which are freed when the next one is asked for."""
        for index, layer in enumerate(self.decoder.layers):
            prefix = f"model.layers.{index}"
            weights = {name: self.read(f"{prefix}.{name}").float() for name, _ in layer.named_parameters()}
            layer.load_state_dict(weights, assign=True)
            layer.requires_grad_(False).eval()
            yield prefix, layer
            layer.to("meta")

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T, L] → float32 [T, L, hidden_size]."""
        return nn.functional.embedding(token_ids.to(self.device), self.read("model.embed_tokens.weight")).float()

    def rotary(self, length: int) -> Any:
        """What layers take as position_embeddings."""
        made = type(self.decoder.rotary_emb)(self.config).to(self.device)
        positions = torch.arange(length, device=self.device).unsqueeze(0)
        return made(torch.zeros(1, 1, 1, device=self.device), positions)


def _files_by_name(folder: Path) -> dict[str, Path]:
    from safetensors import SafetensorError, safe_open

    paths = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if (folder / _INDEX).is_file():
        shards = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        paths = [folder / Path(name).name for name in sorted(shards)]
    if not paths:
        raise ModelError(f"{folder.name} holds no *.safetensors")
    found: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path.name} cannot be read: {error}") from None
    return found
