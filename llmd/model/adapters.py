"""Adapters as files hold them: small changes to a base model's linears, read by a format, checked against the base.

files ─► AdapterFormat.load ─► Adapter (host, by the base's names) ─► adapter_packing ─► adapter_slots (device)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from llmd.errors import AdapterError

if TYPE_CHECKING:  # `llmd check` reads adapters without it
    from torch import Tensor


class BaseModule(NamedTuple):
    """A module of the base model that an adapter may change, whole, as its checkpoint has it."""

    kind: Literal["linear", "merged", "embedding", "head"]  # merged: several linears of the checkpoint as one
    in_features: int  # of an embedding: its entries
    out_features: int
    whole: str = ""  # the merged module that this one is a part of


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """W + scaling · b · a for one module, with what may come along."""

    a: Tensor  # [rank, in_features]
    b: Tensor  # [out_features, rank]
    scaling: float
    b_bias: Tensor | None = None  # [out_features], added after b and scaled with it
    magnitude: Tensor | None = None  # [out_features], DoRA: the norms that the rows of the sum are brought to

    @property
    def rank(self) -> int:
        """Rows of a."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What an adapter changes, by the base's module names."""

    modules: Mapping[str, LowRank]
    biases: Mapping[str, Tensor] = field(default_factory=dict)  # in place of the base's
    copies: Mapping[str, Tensor] = field(default_factory=dict)  # whole weights that must be the base's own

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max((module.rank for module in self.modules.values()), default=0)


class AdapterFormat(Protocol):
    """How adapters lie in files."""

    def detect(self, path: Path) -> bool:
        """Whether a folder holds an adapter of this format; reads no tensor."""

    def load(self, path: Path, modules: Mapping[str, BaseModule], max_rank: int) -> Adapter:
        """Read and check an adapter against the base's modules. Raises AdapterError that names the tensor or key."""

    def check(self, path: Path, modules: Mapping[str, BaseModule] | None, max_rank: int) -> None:
        """Raise what `load` would, as far as files tell without a tensor being read; None: the base is not known."""


def read_adapter(path: Path, formats: Mapping[str, Any], modules: Mapping[str, BaseModule], max_rank: int) -> Adapter:
    """The adapter in a folder, by the first format that knows it."""
    return find_format(path, formats).load(path, modules, max_rank)


def find_format(path: Path, formats: Mapping[str, Any]) -> AdapterFormat:
    """The first format that knows a folder. Raises AdapterError where none does."""
    if not path.is_dir():
        raise AdapterError(f"the adapter's folder {path.name!r} does not exist")
    for spec in sorted(formats.values(), key=lambda spec: spec.order):
        adapter_format: AdapterFormat = spec.build()
        if adapter_format.detect(path):
            return adapter_format
    raise AdapterError(f"{path.name!r} holds no adapter; formats looked for: {', '.join(sorted(formats)) or 'none'}")


def find_module(name: str, modules: Mapping[str, BaseModule]) -> str | None:
    """The base's name for a module that a file names with a leading part more or less ("model.")."""
    if name in modules:
        return name
    shorter = name.partition(".")[2]
    if shorter in modules:
        return shorter
    longer = [known for known in modules if known.partition(".")[2] == name]
    return longer[0] if len(longer) == 1 else None
