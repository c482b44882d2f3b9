"""Attention backends: their protocol and how one is chosen. Loads no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llmd.errors import ModelError

log = logging.getLogger("llmd.model")

if TYPE_CHECKING:
    import torch

    from llmd.model.batch import Batch
    from llmd_kernels.quantized_kv import LayerKV


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionNeeds:
    """What a model and device ask of an attention backend."""

    device: str  # "cpu", "cuda" …
    dtype: str  # "bfloat16" …
    head_dim: int
    num_heads: int
    num_kv_heads: int
    block_size: int
    sliding_window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    has_alibi: bool = False
    kv_cache_dtype: str = "auto"
    for_encoder: bool = False  # no cache, every token sees every other; only asked of backends made for it


class AttentionExtras(NamedTuple):
    """What some models do to scores; only backends whose `why_not` accepts it are ever handed one."""

    soft_cap: float | None = None  # scores become cap · tanh(score / cap)
    sinks: torch.Tensor | None = None  # [H] float32, a score more in each head's softmax, of nothing
    alibi_slopes: torch.Tensor | None = None  # [H] float32, times a key's distance before the query, taken off its score


class HeadTurn(NamedTuple):
    """What happens to a step's heads before they are stored; handed to backends that say `turns_heads = True`."""

    positions: torch.Tensor  # [T] int64
    cos_sin: torch.Tensor  # [max_position, R] float32, the cosines of the R/2 angles and then their sines
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None  # RMSNorm weights [D] of q's and k's heads, and eps


class AttentionBackend(Protocol):
    """Causal attention over the paged KV cache. One object serves all layers of a model."""

    def why_not(self, needs: AttentionNeeds) -> list[str]:
        """Reasons why it cannot serve these needs; empty means yes."""

    def kv_shape(self, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """What one layer of one block holds: [k/v, token, head, dim] in the common layout, which eight-bit caches need."""

    def prepare(self, batch: Batch) -> Any:
        """What all layers of a step share; handed to every `forward` of the step as `meta`."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv: LayerKV,
        meta: Any,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Store k, v [T, K, D] in kv [num_blocks, *kv_shape], then attend with q [T, H, D]: [T, H, D], contiguous.

        kv is a QuantizedKV where kv_cache_dtype is of eight bits. For models that have them: `extras`, AttentionExtras. A
        backend with an attribute `turns_heads = True` is given `turn`, a HeadTurn, and q and k as they were projected.
        """


class EncoderAttentionBackend(Protocol):
    """Attention of every token to every other of its sequence, which a batch holds whole. Nothing is cached."""

    def why_not(self, needs: AttentionNeeds) -> list[str]:
        """Reasons why it cannot serve these needs; empty means yes."""

    def prepare(self, batch: Batch) -> Any:
        """What all layers of a step share; handed to every `forward` of the step as `meta`."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: Any, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [T, H, D], k and v [T, K, D] → [T, H, D], contiguous; `window`: how far a token sees to either side."""


class BackendSpec(Protocol):
    """What is read of an AttentionBackendSpec."""

    @property
    def build(self) -> Callable[[], Any]: ...

    @property
    def for_encoders(self) -> bool: ...

    @property
    def priority(self) -> int: ...


def is_of_kind(spec: BackendSpec, needs: AttentionNeeds) -> bool:
    """Whether a backend is made for such models at all: causal ones over a cache, or encoders."""
    return getattr(spec, "for_encoders", False) == needs.for_encoder


def select_backend(
    needs: AttentionNeeds,
    specs: Mapping[str, BackendSpec],
    name: str = "auto",
    select: Callable[[AttentionNeeds, Sequence[str]], str | None] | None = None,
) -> tuple[str, AttentionBackend]:
    """The backend that the config names, that the select hook names, or the usable one of highest priority."""
    if name != "auto" and name not in specs:
        raise ModelError(f"attention_backend {name!r} is not known; known are {', '.join(sorted(specs)) or 'none'}")
    specs = {key: spec for key, spec in specs.items() if is_of_kind(spec, needs)}
    if name != "auto" and name not in specs:
        raise ModelError(
            f"attention_backend {name!r} cannot serve this model, which is {'an encoder' if needs.for_encoder else 'none'}; "
            f"those that can are {', '.join(sorted(specs)) or 'none'}"
        )
    backends = {key: spec.build() for key, spec in specs.items() if name in ("auto", key)}
    reasons = {key: backend.why_not(needs) for key, backend in backends.items()}
    usable = sorted((key for key in backends if not reasons[key]), key=lambda key: (-specs[key].priority, key))
    if not usable:
        told = "; ".join(f"{key}: {', '.join(why)}" for key, why in sorted(reasons.items()))
        raise ModelError(f"no attention backend can serve this model ({told or 'none is loaded'})")
    chosen = select(needs, usable) if select is not None and name == "auto" else None
    if chosen is not None and chosen not in usable:
        raise ModelError(f"a plugin selected attention backend {chosen!r}; usable are {', '.join(usable)}")
    chosen = chosen or usable[0]
    others = "; ".join(f"{key}: {', '.join(why)}" for key, why in sorted(reasons.items()) if why)
    log.info("attention %s%s", chosen, f" (not {others})" if others else "")
    return chosen, backends[chosen]
