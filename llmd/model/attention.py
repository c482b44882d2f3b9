"""Attention backends: their protocol, what they say of what they serve, and how one is chosen. Loads no torch."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLimits:
    """What a backend serves; what a model asks beyond it is put into words here, the same for all backends."""

    device: str | None = None  # "cpu", "cuda"; None: any
    nvidia_only: bool = False
    oldest: tuple[int, int] = (0, 0)  # compute capability of NVIDIA's GPUs
    newest: tuple[int, int] | None = None
    dtypes: tuple[str, ...] | None = None  # of the model; None: any
    kv_cache_dtypes: tuple[str, ...] | None = ("auto",)  # besides the model's own dtype; None: any
    max_head_dim: int | None = None
    head_dims: tuple[int, ...] | None = None
    head_dim_multiple: int = 1
    block_multiple: int = 1
    has_soft_cap: bool = True
    has_sinks: bool = True
    has_alibi: bool = True

    def why_not(self, needs: AttentionNeeds) -> list[str]:
        """Reasons of the device and of the model; empty means that both are served."""
        return self.of_device(needs) + self.of_model(needs)

    def of_device(self, needs: AttentionNeeds) -> list[str]:
        """Reasons why not on this device. Asks torch about a GPU only where the limits hang on it."""
        if self.device is not None and needs.device != self.device:
            return [f"only for {'CPUs' if self.device == 'cpu' else 'GPUs'}, not {needs.device}"]
        is_any = not self.nvidia_only and self.oldest == (0, 0) and self.newest is None
        if needs.device != "cuda" or is_any:
            return []
        import torch

        if torch.version.hip is not None:
            return ["only for GPUs of NVIDIA"] if self.nvidia_only else []
        return self._of_generation(torch.cuda.get_device_capability()) if torch.cuda.is_available() else []

    def _of_generation(self, found: tuple[int, int]) -> list[str]:
        if found < self.oldest:
            return [f"needs {_sm(self.oldest)} or newer, not {_sm(found)}"]
        if self.newest is not None and found > self.newest:
            return [f"needs {_sm(self.newest)} or older, not {_sm(found)}"]
        return []

    def of_model(self, needs: AttentionNeeds) -> list[str]:
        """Reasons why not for this model and configuration."""
        reasons = []
        if self.dtypes is not None and needs.dtype not in self.dtypes:
            reasons.append(f"no dtype {needs.dtype}")
        reasons += self._of_heads(needs.head_dim)
        if needs.block_size % self.block_multiple:
            wanted = self.block_multiple
            reasons.append(f"block_size {needs.block_size} is no multiple of {wanted}: set block_size = {wanted}")
        if self.kv_cache_dtypes is not None and needs.kv_cache_dtype not in (*self.kv_cache_dtypes, needs.dtype):
            reasons.append(f"no kv_cache_dtype {needs.kv_cache_dtype}")
        asked = {
            "soft cap": not self.has_soft_cap and needs.soft_cap is not None,
            "attention sinks": not self.has_sinks and needs.has_sinks,
            "ALiBi": not self.has_alibi and needs.has_alibi,
        }
        return reasons + [f"no {name}" for name, is_lacking in asked.items() if is_lacking]

    def _of_heads(self, head_dim: int) -> list[str]:
        if self.head_dims is not None and head_dim not in self.head_dims:
            return [f"head_dim {head_dim} is none of {', '.join(map(str, self.head_dims))}"]
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return [f"head_dim {head_dim} is above {self.max_head_dim}"]
        if head_dim % self.head_dim_multiple:
            return [f"head_dim {head_dim} is no multiple of {self.head_dim_multiple}"]
        return []


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


class Merit(NamedTuple):
    """What a backend that can serve a model is worth here, in the place of its spec's priority."""

    priority: int
    reason: str  # "not measured on sm_90"


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
    """Causal attention over the paged KV cache. One object serves all layers of a model.

    One whose worth hangs on the device has `merit(needs) -> Merit` besides.
    """

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
    choice = choose_backend(needs, specs, name, select)
    others = "; ".join(f"{key}: {why}" for key, why in sorted(choice.others.items()) if why)
    told = "; ".join(filter(None, (choice.reason, f"not {others}" if others else "")))
    log.info("attention %s%s", choice.name, f" ({told})" if told else "")
    return choice.name, choice.backend


class Choice(NamedTuple):
    """A backend, and why it rather than the others that were weighed."""

    name: str
    backend: AttentionBackend
    reason: str  # its merit in words; "" where its priority alone counts
    others: dict[str, str]  # why not each; "" for those of less priority


def choose_backend(
    needs: AttentionNeeds,
    specs: Mapping[str, BackendSpec],
    name: str = "auto",
    select: Callable[[AttentionNeeds, Sequence[str]], str | None] | None = None,
) -> Choice:
    """As select_backend, with the reasons and without the log. Raises ModelError where none can be taken."""
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
    merits = {key: _merit(specs[key], backends[key], needs) for key in backends if not reasons[key]}
    usable = sorted(merits, key=lambda key: (-merits[key].priority, key))
    if not usable:
        told = "; ".join(f"{key}: {', '.join(why)}" for key, why in sorted(reasons.items()))
        raise ModelError(f"no attention backend can serve this model ({told or 'none is loaded'})")
    chosen = select(needs, usable) if select is not None and name == "auto" else None
    if chosen is not None and chosen not in usable:
        raise ModelError(f"a plugin selected attention backend {chosen!r}; usable are {', '.join(usable)}")
    chosen = chosen or usable[0]
    others = {key: _why_less(merits[key]) if key in merits else ", ".join(reasons[key]) for key in backends if key != chosen}
    return Choice(chosen, backends[chosen], merits[chosen].reason, others)


def _why_less(merit: Merit) -> str:
    return f"usable; {merit.reason}" if merit.reason else ""


def _merit(spec: BackendSpec, backend: Any, needs: AttentionNeeds) -> Merit:
    judge = getattr(backend, "merit", None)
    return Merit(spec.priority, "") if judge is None else judge(needs)
