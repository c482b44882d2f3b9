"""A checkpoint as it grows: shards as they fill up, at the end the index and the files beside it, moved in place at once."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmd.api.v1 import ModelError

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_OWN = ("config.json", "model.safetensors.index.json")


class Writer:
    """Writes beside the folder and moves it in place when all is there. Raises ModelError where the disk says no."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_shard_bytes
        self._made = folder.with_name(f".{folder.name}.partial")
        self._shards: list[dict[str, int]] = []  # of each, its tensors and their bytes
        self._open: dict[str, Tensor] = {}

    def start(self, needed_bytes: int) -> None:
        """Make the folder, if there is room."""
        if self._folder.exists():
            raise ModelError(f"--output {self._folder} exists already")
        try:
            shutil.rmtree(self._made, ignore_errors=True)
            self._made.mkdir(parents=True)
        except OSError as error:
            raise self._failed(error) from None
        free = shutil.disk_usage(self._made).free
        if free < needed_bytes:
            self.abandon()
            raise ModelError(f"--output {self._folder}: {free} bytes are free on that disk, {needed_bytes} may be needed")

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors, and write a shard when they are enough."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.itemsize
            if self._open and _size(self._open) + size > self._max_bytes:
                self._flush()
            self._open[name] = tensor.detach().cpu().contiguous()

    def finish(self, source: Path, config: Mapping[str, Any]) -> int:
        """Write what is left and the index, copy what stands beside the weights; the bytes of all weights."""
        self._flush()
        try:
            names = self._name_shards()
            if len(names) > 1:
                total = sum(size for shard in self._shards for size in shard.values())
                places = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
                index = {"metadata": {"total_size": total}, "weight_map": places}
                (self._made / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
            for pattern in _COPIED:
                for file in source.glob(pattern):
                    if file.name not in _OWN:
                        shutil.copyfile(file, self._made / file.name)
            (self._made / "config.json").write_text(json.dumps(config, indent=2))
            self._made.rename(self._folder)
        except OSError as error:
            raise self._failed(error) from None
        return sum(size for shard in self._shards for size in shard.values())

    def abandon(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._made, ignore_errors=True)

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self._open:
            return
        try:
            save_file(self._open, self._made / f"{len(self._shards)}.safetensors", metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise self._failed(error) from None
        self._shards.append({name: tensor.numel() * tensor.itemsize for name, tensor in self._open.items()})
        self._open = {}

    def _name_shards(self) -> list[str]:
        count = len(self._shards)
        names = ["model.safetensors"] if count == 1 else [
            f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)
        ]  # fmt: skip
        for index, name in enumerate(names):
            (self._made / f"{index}.safetensors").rename(self._made / name)
        return names

    def _failed(self, error: Exception) -> ModelError:
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        return ModelError(f"--output {self._folder} cannot be written: {'the disk is full' if is_full else error}")


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
