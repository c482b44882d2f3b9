"""`zeta.json` {"scaling": number}; tensors `<module>.a` [rank, in_features] and `<module>.b` [out_features, rank]."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llmd.api.v1 import Adapter, AdapterError, BaseModule, LowRank, find_module

SETTINGS, TENSORS = "zeta.json", "zeta.safetensors"


class ZetaFormat:
    """Reads and checks one folder at a time; called off the loop."""

    def detect(self, path: Path) -> bool:
        return (path / SETTINGS).is_file()

    def check(self, path: Path, modules: Mapping[str, BaseModule] | None, max_rank: int) -> None:
        _scaling(path)
        for name, shapes in _shapes(path).items():
            _check_pair(name, shapes, modules, max_rank)

    def load(self, path: Path, modules: Mapping[str, BaseModule], max_rank: int) -> Adapter:
        self.check(path, modules, max_rank)
        scaling, pairs = _scaling(path), {}
        with safe_open(path / TENSORS, "pt") as file:
            for name in _shapes(path):
                known = find_module(name, modules) or name
                pairs[known] = LowRank(a=file.get_tensor(f"{name}.a"), b=file.get_tensor(f"{name}.b"), scaling=scaling)
        return Adapter(modules=pairs)


def _scaling(path: Path) -> float:
    try:
        return float(json.loads((path / SETTINGS).read_text(encoding="utf-8"))["scaling"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{SETTINGS}: scaling cannot be read: {type(error).__name__}") from None


def _shapes(path: Path) -> dict[str, tuple[list[int], list[int]]]:
    try:
        with safe_open(path / TENSORS, "pt") as file:
            names = [name.removesuffix(".a") for name in file.keys() if name.endswith(".a")]  # noqa: SIM118 - no dict
            return {
                name: (file.get_slice(f"{name}.a").get_shape(), file.get_slice(f"{name}.b").get_shape()) for name in names
            }
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{TENSORS} cannot be read: {error}") from None


def _check_pair(
    name: str, shapes: tuple[list[int], list[int]], modules: Mapping[str, BaseModule] | None, max_rank: int
) -> None:
    a, b = shapes
    if not 0 < a[0] <= max_rank:
        raise AdapterError(f"{name}: rank {a[0]}; allowed: 1 to {max_rank} (adapters.max_lora_rank)")
    if modules is None:
        return
    known = find_module(name, modules)
    if known is None:
        raise AdapterError(f"{name}: the base has no such module")
    base, wanted = modules[known], f"a [{a[0]}, {modules[known].in_features}], b [{modules[known].out_features}, {a[0]}]"
    if a != [a[0], base.in_features] or b != [base.out_features, a[0]]:
        raise AdapterError(f"{name}: a {a}, b {b}; expected: {wanted}")
