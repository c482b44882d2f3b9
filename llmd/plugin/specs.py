"""What register hooks return: frozen facts and a `build` that imports the heavy module when it is first wanted.

Every spec has a `name` (unique in its family; a wheel's overrides a built-in's) and a one-line `summary`. A field with a
default may be added in any release; removing one is API v2.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmd.model.attention import AttentionNeeds as AttentionNeeds  # a layer's word, told here for hooks

if TYPE_CHECKING:
    import click
    from aiohttp import web
    from prometheus_client import CollectorRegistry
    from pydantic import BaseModel

    from llmd.config import ModelConfig
    from llmd.engine.executor import Executor, LoadProgress
    from llmd.engine.queue import WaitingQueue
    from llmd.model.adapters import AdapterFormat
    from llmd.model.logits import LogitsProcessor
    from llmd.model.quantization import Quantization
    from llmd.model.sampler import Sampler
    from llmd.model.weights import Checkpoint
    from llmd.server.auth import Authenticator
    from llmd.text.parsers import CallForm, Parser
    from llmd.text.structured import Constraint, GrammarCompiler


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """What every spec says."""

    name: str
    summary: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigSectionSpec(Spec):
    """`[plugins.<name>]` in the config file is parsed into `model`, a frozen pydantic model with defaults."""

    model: type[BaseModel]
    live: frozenset[str] = frozenset()  # fields that a reload may change while serving


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandSpec(Spec):
    """`llmd <name>`: `build()` returns the click command; it is imported only when the command is called."""

    build: Callable[[], click.Command]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSourceSpec(Spec):
    """Where a model's files come from. The first in `order` whose `claims` says yes to the model's name resolves it."""

    claims: Callable[[ModelConfig], bool]
    resolve: Callable[[ModelConfig, Callable[[LoadProgress], None]], Path]  # may block: called off the loop
    order: int = 100
    check: Callable[[ModelConfig], str | None] | None = None  # what is wrong as far as files here tell, for `llmd check`
    adapters: Callable[[ModelConfig], Mapping[str, str]] | None = None  # those that come with the model: name → folder


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFormatSpec(Spec):
    """How weights lie in files: `detect(folder)` says whether this format is there, `build(folder)` opens it."""

    detect: Callable[[Path], bool]
    build: Callable[..., Checkpoint]  # (folder, model_config) -> Checkpoint
    order: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchitectureSpec(Spec):
    """A model architecture; `architectures` are the names in config.json that it serves, "*" what no other one serves.

    An encoder has no KV groups: each token attends to every other of its prompt, which is computed whole. What serves "*" is
    asked `why_not(content of config.json)`, without torch: reasons, empty means that it can. `spell` turns that content into
    the words of Llama's config.json, where a model has others; it may raise ModelError and import what it needs.

    `has_state`: layers keep tensors a row between steps (`Layers.state`), beside the KV of those that attend or instead of
    it. Such a model is served without prefix caching: a cached prefix has no state at its end.
    """

    architectures: tuple[str, ...]
    build: Callable[..., Any]  # (config, layers) -> torch.nn.Module with forward(batch) and weight_names
    is_encoder: bool = False
    why_not: Callable[[Mapping[str, Any]], list[str]] | None = None
    spell: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    has_state: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationSpec(Spec):
    """A quantization method. `build(settings)` returns the Quantization that gives each linear its QuantMethod.

    `check(settings)` tells whether a checkpoint's quantization_config is of this method, and raises ModelError for what the
    method cannot read of it; it loads no torch, so that `llmd check` may ask. Without it only `detect` tells.
    """

    build: Callable[..., Quantization]
    online: bool = False  # can quantize a 16-bit checkpoint while it loads
    check: Callable[[Mapping[str, Any]], bool] | None = None
    devices: tuple[str, ...] = ()  # device types that it runs on: "cpu", "cuda"; none: on all


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBackendSpec(Spec):
    """A way to compute attention over the paged KV cache; the usable one with the highest `priority` is taken.

    With `for_encoders`, `build` gives an EncoderAttentionBackend instead: no cache, every token sees every other.
    """

    build: Callable[[], Any]
    priority: int = 0
    for_encoders: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFormatSpec(Spec):
    """A file format of adapters; of those that find their files in a folder, the lowest `order` reads it."""

    build: Callable[[], AdapterFormat]
    order: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class KVStoreSpec(Spec):
    """A tier below the device's KV pool: host memory, disk, a peer."""

    build: Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsProcessorSpec(Spec):
    """A step between logits and sampling, for the rows that want it."""

    build: Callable[..., LogitsProcessor]  # (LogitsContext) -> LogitsProcessor
    order: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerSpec(Spec):
    """Turns logits into tokens for all rows at once."""

    build: Callable[..., Sampler]  # (SamplerContext) -> Sampler
    priority: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposerSpec(Spec):
    """Drafts tokens that the model then verifies (speculative decoding)."""

    build: Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarSpec(Spec):
    """Compiles structured-output constraints into token bitmasks; `kinds` are the constraint kinds it takes.

    Of the grammars that take a kind, the one with the lowest `order` whose library is installed is used.
    """

    build: Callable[..., GrammarCompiler]  # (GrammarContext) -> GrammarCompiler
    kinds: tuple[str, ...] = ()
    order: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class ParserSpec(Spec):
    """Splits generated text into content, reasoning or tool calls. `claims(facts)` says whether it fits a model.

    A tool parser is built with `build(tools, make_id=…)`, both optional, a reasoning parser with `build(prompt)`, the
    prompt's text. `form` is how the format writes its calls: what forces them, and strict functions, are made of it.
    Where a format is no CallForm, `constrain(tools, choice)` gives what forces a call, of the function named by `choice`
    or ("required") of any of the tools.
    """

    build: Callable[..., Parser]
    claims: Callable[[Mapping[str, Any]], bool] | None = None
    constrain: Callable[[Sequence[Mapping[str, Any]], str], Constraint | None] | None = None
    form: CallForm | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorSpec(Spec):
    """Runs the device: a thread, a process, several nodes."""

    build: Callable[..., Executor]  # (model_config, *, path, cache, scheduler, parts) -> Executor; called off the loop
    warm_up: Callable[[], None] | None = None  # imports what takes long; called in a thread while the rest comes up


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulingPolicySpec(Spec):
    """The order of the waiting queue."""

    build: Callable[..., WaitingQueue]  # (SchedulerConfig) -> WaitingQueue


@dataclass(frozen=True, kw_only=True, slots=True)
class AuthenticatorSpec(Spec):
    """Says who asks. `build(config)` may return None: nothing to check with this configuration. Fails closed."""

    build: Callable[..., Authenticator | None]
    order: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class MiddlewareSpec(Spec):
    """Wraps every HTTP request; lower `order` is further out. `build(config)` may return None: not wanted."""

    build: Callable[..., Any]  # (config) -> aiohttp middleware | None
    order: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteSpec(Spec):
    """One HTTP route. `build(context)` imports and returns the aiohttp handler.

    `openapi` is the operation object for /openapi.json. A route asks for a key unless the config opens it;
    `admin` routes ask for the admin key.
    """

    method: str
    path: str
    build: Callable[..., Callable[[web.Request], Awaitable[web.StreamResponse]]]
    openapi: Callable[[], Mapping[str, Any]] | None = None
    admin: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsSpec(Spec):
    """Adds collectors to the Prometheus registry; `build(registry, context)` registers them once."""

    build: Callable[[CollectorRegistry, Any], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSpec(Spec):
    """Something that runs beside the server: `build(context)` returns an async context manager, entered at start."""

    build: Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSummary:
    """The receipt of one ended request (DESIGN §9: exactly one each)."""

    request_id: str
    model: str
    key: str
    route: str
    status: int
    finish_reasons: tuple[str, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    queue_s: float
    ttft_s: float | None
    e2e_s: float
    client_gone: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = ""
    arrived_s: float = 0.0  # wall clock
    prefill_s: float | None = None  # from the first row given to the first token
    decode_s: float | None = None  # from the first token to the end
    num_steps: int = 0  # engine steps from the first row given to the last token
    num_preemptions: int = 0

    def fields(self) -> dict[str, Any]:
        """The receipt as plain data, as logs, headers and admin routes show it."""
        return {
            "request_id": self.request_id,
            "arrived_s": round(self.arrived_s, 3),
            "method": self.facts.get("method", ""),
            "route": self.route,
            "status": self.status,
            "model": self.model,
            "adapter": self.adapter,
            "key": self.key,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": self.num_output_tokens,
            "queue_ms": _ms(self.queue_s),
            "prefill_ms": _ms(self.prefill_s),
            "decode_ms": _ms(self.decode_s),
            "ttft_ms": _ms(self.ttft_s),
            "e2e_ms": _ms(self.e2e_s),
            "steps": self.num_steps,
            "preemptions": self.num_preemptions,
            "finish_reasons": list(self.finish_reasons),
            "client_gone": self.client_gone,
            "trace_id": self.facts.get("traceparent", "")[3:35],
            "error": self.facts.get("error"),
        }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)
