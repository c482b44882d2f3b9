"""Attention by an installed library beside llmd's own kernels: what their adapters share. Loads no torch.

    heads ─► turned and stored by llmd's kernels ─┬─► prompts, and prompts beside decodes ─► the library
                                                  └─► decode steps, which graphs hold ─────► llmd's kernels

Both read the same cache where it lies. A library has the decode steps too where a measurement on this device says that it is
the quicker (`llmd_kernels.paged_attention.libraries`), and only such a measurement puts it before llmd's kernels; the
configuration may name it whatever was measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from llmd.model.attention import AttentionLimits, AttentionNeeds, Merit

if TYPE_CHECKING:
    import torch

    from llmd.model.attention import AttentionExtras, HeadTurn
    from llmd.model.batch import Batch
    from llmd_kernels.paged_attention import AttentionCall
    from llmd_kernels.paged_attention.libraries import Phases
    from llmd_kernels.quantized_kv import LayerKV

PRIORITY = 40  # below that of llmd's kernels
_PRIORITY_WHERE_QUICKER = 70  # above it

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LibraryStep:
    """One step, and what a library works out once for all its layers."""

    batch: Batch
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made for the first layer that asks."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def block_table(self, call: AttentionCall) -> torch.Tensor:
        """[R, W] int32: the blocks of the step's rows in their order, as far as the longest may reach."""
        reach = -(-self.batch.max_seq_len // call.kv.shape[2])
        return self.once("block_table", lambda: call.block_table[:, :reach].index_select(0, call.rows))

    def planes(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [num_blocks, block_size, K, D], views of the pool. Raises ValueError for a cache of eight bits."""
        if isinstance(call.kv, tuple):
            raise ValueError("a library reads keys and values of the model's dtype, not a cache of eight bits")
        keys, values = call.kv.unbind(1)
        return keys, values

    def key_start(self, call: AttentionCall) -> torch.Tensor:
        """[R+1] int32: where each row's keys would begin if all lay one behind the other."""

        def make() -> torch.Tensor:
            start = call.seq_lens.new_zeros(len(call.seq_lens) + 1)
            start[1:] = call.seq_lens.cumsum(0)
            return start

        return self.once("key_start", make)


def stored_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: LayerKV,
    batch: Batch,
    *,
    scale: float,
    window: int | None,
    extras: AttentionExtras | None = None,
    turn: HeadTurn | None = None,
) -> AttentionCall:
    """Turn heads and store k and v by llmd's kernels; what is left to do for q, as kernels take it. See AttentionBackend."""
    from llmd_kernels.paged_attention import AttentionCall
    from llmd_kernels.store_kv import rotary_store_kv, store_kv

    if turn is None:
        store_kv(k, v, kv, batch.slot_mapping)
    else:
        rotary_store_kv(q, k, v, kv, turn.positions, batch.slot_mapping, turn.cos_sin, turn.norms)
    return AttentionCall(
        q, kv, batch.block_tables[0], batch.rows, batch.query_start, batch.seq_lens, batch.max_query_len, scale, window,
        *(extras or ()),
    )  # fmt: skip


class AttentionLibrary(Protocol):
    """An adapter of one library."""

    @property
    def name(self) -> str:
        """The backend's, by which its speed is looked up."""

    @property
    def limits(self) -> AttentionLimits:
        """What it serves."""

    @property
    def can_decode(self) -> bool:
        """Whether its decode neither waits for the device nor hangs on lengths, so that graphs may hold it."""

    def missing(self) -> list[str]:
        """What is not installed; empty means that it can be imported."""

    def attend(self, call: AttentionCall, step: LibraryStep) -> torch.Tensor:
        """[T, H, D], contiguous. The cache is a plain tensor, of q's dtype, and holds this step's keys and values."""


class LibraryAttention:
    """The backend that an adapter makes."""

    turns_heads = True

    def __init__(self, library: AttentionLibrary) -> None:
        self._library = library
        self._phases: dict[tuple[torch.device, int], Phases] = {}

    def why_not(self, needs: AttentionNeeds) -> list[str]:
        """As the protocol says: of the device, of what is installed, of the model, whichever fails first."""
        limits = self._library.limits
        return limits.of_device(needs) or self._missing() or limits.of_model(needs)

    def _missing(self) -> list[str]:
        if find_spec("triton") is None:
            return ["triton is not installed, which stores and decodes"]
        return self._library.missing()

    def merit(self, needs: AttentionNeeds) -> Merit:
        """Before llmd's kernels where it was measured to be quicker on this device."""
        import torch

        from llmd_kernels.gpu import device_name
        from llmd_kernels.paged_attention import libraries

        if not torch.cuda.is_available():  # a plan for a machine that is not this one
            return Merit(PRIORITY, "not measured, for no GPU is here")
        device = device_name(torch.device(needs.device))
        found = libraries.speed(self._library.name, device, needs.head_dim)
        if found is None:
            return Merit(PRIORITY, f"not measured on {device}")
        factors = ", ".join(f"{phase} {factor:.2f}" for phase, factor in found._asdict().items() if factor)
        priority = _PRIORITY_WHERE_QUICKER if libraries.is_quicker(found) else PRIORITY
        return Merit(priority, f"times as fast as Triton on {device}: {factors}")

    def kv_shape(self, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """The common layout."""
        return (2, block_size, num_kv_heads, head_dim)

    def prepare(self, batch: Batch) -> LibraryStep:
        """Nothing yet: whether the library has this step hangs on the layers' heads."""
        return LibraryStep(batch)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv: LayerKV,
        meta: LibraryStep,
        *,
        scale: float,
        window: int | None,
        extras: AttentionExtras | None = None,
        turn: HeadTurn | None = None,
    ) -> torch.Tensor:
        """As the protocol says."""
        from llmd_kernels.paged_attention import paged_attention

        call = stored_call(q, k, v, kv, meta.batch, scale=scale, window=window, extras=extras, turn=turn)
        if not self._has(call):
            return paged_attention(call)
        call.check()
        if getattr(q, "fake_mode", None) is not None:  # a tensor without numbers, for which kernels are only compiled
            return q.new_empty(q.shape)
        return self._library.attend(call, meta)

    def _has(self, call: AttentionCall) -> bool:
        """Whether the library computes a step of this kind."""
        key = call.q.device, call.q.shape[2]
        phases = self._phases.get(key)
        if phases is None:
            phases = self._phases[key] = self._of_device(*key)
        return phases.decode and self._library.can_decode if call.max_query_len == 1 else phases.prefill

    def _of_device(self, device: torch.device, head_dim: int) -> Phases:
        from llmd_kernels.gpu import device_name
        from llmd_kernels.paged_attention import libraries

        return libraries.phases(libraries.speed(self._library.name, device_name(device), head_dim))


def missing_release(distribution: str, least: str) -> list[str]:
    """Why a distribution cannot be used: not installed, or older than `least` ("2.6.0"). Imports nothing of it."""
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return [f"{distribution} is not installed"]
    return [f"{distribution} {found} is older than {least}"] if _release(found) < _release(least) else []


def _release(text: str) -> tuple[int, ...]:
    """(2, 8, 3) of "2.8.3.post1+cu12", (3,) of "3.0.0.b1": what counts for an order of releases."""
    match = re.match(r"\d+(\.\d+)*", text)
    digits = re.sub(r"(\.0)+$", "", match[0]) if match else ""
    return tuple(map(int, digits.split("."))) if digits else ()
